import json, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))

def notebooks(folder='.'):
    "The notebooks in a folder under nbs/, in order"
    return sorted(p for p in (root/'nbs'/folder).rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))

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
