import json, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))

def notebooks(folder='.'):
    "The notebooks in a folder under nbs/, in order, without the workshop's exercises, which are cut from their solutions"
    return sorted(p for p in (root/'nbs'/folder).rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts) and not p.with_stem(f'{p.stem}_solutions').exists())

def cells(path, kind='code'):
    "The cells of a notebook, each with its source as one string"
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [{**c, 'source': ''.join(c['source'])} for c in nb['cells'] if c['cell_type'] == kind]

def name(path): return str(path.relative_to(root/'nbs').with_suffix(''))

@pytest.fixture(scope='session')
def about():
    "settings.ini"
    config = ConfigParser()
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site, built in _docs where `make docs` finds it again, and looked at in another folder."
    res = subprocess.run([sys.executable, root/'tools/build_site.py'], capture_output=True, text=True)
    if res.returncode: pytest.fail(res.stdout + res.stderr, pytrace=False)
    return shutil.copytree(root/'_docs', tmp_path_factory.mktemp('stick')/'site')

def page_of(path): return re.sub(r'(^|/)\d+[a-z0-9]*_', r'\1', name(path).lower()) + '.html'
