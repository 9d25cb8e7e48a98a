import json, os, re, shutil, subprocess, sys, time
from configparser import ConfigParser
from pathlib import Path
import pytest
from histogene_nb.files import data_folder, published_sections

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))

# With HISTOGENE_DATA set, as in CI, nothing is skipped for want of data: what is missing there is a failure
WANTS = 'needs the real sections: set HISTOGENE_DATA to the folder that holds her2st'
needs_counts = pytest.mark.skipif(not (os.environ.get('HISTOGENE_DATA') or all((data_folder()/f'ST-cnts/{n}.tsv.gz').is_file() for n in published_sections())), reason=f'{WANTS}, or fetch them (50 MB) with histogene_download --no-images')
needs_images = pytest.mark.skipif(not os.environ.get('HISTOGENE_DATA'), reason=f'{WANTS} with the photographs of B4 and C3, and the published panel')

# What `make quick` leaves out
LONG = dict(test_notebooks='every notebook run from top to bottom', test_site='the site built', test_browser='and opened in Chromium', test_kills='commands killed at any moment',
            test_commands='the commands as typed', test_distributed='several processes', test_crossval='Ray', test_slides='slides of 40,000 pixels', test_any_section='whole ways through the commands',
            test_fuzz='damaged files by the hundred', test_workshop='the workshop worked through', test_properties='properties on random input')

def pytest_addoption(parser):
    parser.addoption('--quick', action='store_true', help='leave out what takes long')
    parser.addoption('--devices', action='store_true', help='only pages and commands on pretended devices')

def pytest_configure(config): config.addinivalue_line('markers', 'devices: on a pretended device; run by make devices')

def on_devices(config):
    "Whether tests on pretended devices are run alone, beside others (their file is named), or not"
    return 'alone' if config.getoption('--devices') else 'too' if any('test_devices' in str(a) for a in config.args) else 'not'

def pytest_ignore_collect(collection_path, config):
    if on_devices(config) == 'alone' and collection_path.name.startswith('test_') and collection_path.name != 'test_devices.py': return True

def made_for_its_file(item):
    "Whether a test uses what is made once for all tests of its file: these run in one process, or it would be made in each"
    return any(f[-1].scope == 'module' for f in item._fixtureinfo.name2fixturedefs.values())

@pytest.hookimpl(tryfirst=True)                                    # before pytest-xdist looks for groups
def pytest_collection_modifyitems(config, items):
    devices, quick = on_devices(config), config.getoption('--quick')
    def left_out(item):
        on = item.get_closest_marker('devices') is not None
        return on and devices == 'not' or not on and devices == 'alone' or quick and item.module.__name__ in LONG
    config.hook.pytest_deselected(items=[i for i in items if left_out(i)])
    items[:] = sorted((i for i in items if not left_out(i)), key=lambda i: (i.module.__name__ not in LONG, not made_for_its_file(i)))        # what is short comes last, and no process is left alone
    for i in items:
        if made_for_its_file(i) and not i.get_closest_marker('xdist_group'): i.add_marker(pytest.mark.xdist_group(i.module.__name__))

def pytest_terminal_summary(terminalreporter, config):
    if on_devices(config) == 'not': terminalreporter.write_line('left out, and run by make devices: pages and commands on pretended devices')
    if config.getoption('--quick'): terminalreporter.write_line(f'left out, and run by make test: {", ".join(LONG.values())}')
    missed = [r for r in terminalreporter.stats.get('skipped', []) if WANTS in str(r.longrepr)]
    if missed: terminalreporter.write_line(f'{len(missed)} tests were skipped for want of the real sections; the lines SKIPPED say how to get them')

def notebooks(folder='.'):
    "The notebooks in a folder under nbs/, in order, without the workshop's exercises, which are cut from their solutions"
    return sorted(p for p in (root/'nbs'/folder).rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts) and not p.with_stem(f'{p.stem}_solutions').exists())

def cells(path, kind='code'):
    "The cells of a notebook, each with its source as one string"
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [{**c, 'source': ''.join(c['source'])} for c in nb['cells'] if c['cell_type'] == kind]

def wait_for(event, limit=1800):
    "Until `event()` is true. The limit is no verdict on speed: only what hangs takes so long"
    start = time.monotonic()
    while not event():
        assert time.monotonic() - start < limit, f'nothing happened in {limit} s'
        time.sleep(.02)

def exports(path):
    "The module that a notebook defines, or None"
    found = [m[1] for c in cells(path) if (m := re.search(r'^#\| *default_exp (\S+)', c['source'], re.M))]
    return found[0] if found else None

def reads_counts(path):
    "Whether a notebook works on the real counts, which it downloads where they are not there"
    return not exports(path) and any('download_her2st(' in c['source'] for c in cells(path))

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
