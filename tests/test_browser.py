"""The built site in a real browser: every page in light, in dark and on a phone, without an error in the console and without asking for anything from elsewhere."""
import http.server, json, shutil, threading
from functools import partial
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from conftest import name, notebooks, page_of

programs = shutil.which('chromium') or shutil.which('google-chrome'), shutil.which('chromedriver')
pytestmark = [pytest.mark.xdist_group('site'), pytest.mark.skipif(not all(programs), reason='needs Chromium and its driver: apt-get install chromium chromium-driver')]

class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@pytest.fixture(scope='module')
def address(site):
    "The site behind a server on this machine, as on the web"
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
                 '--disable-dev-shm-usage', f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"): options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()

def view(browser, width=1280, dark=False):
    "The window's width, and what the reader's system prefers"
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600))
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')]))

def faults(browser, address):
    "Since the last call: errors in the console, and requests to anywhere but `address`"
    said = [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE']
    events = [json.loads(e['message'])['message'] for e in browser.get_log('performance')]
    asked = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
    return said + [u for u in asked if not u.startswith((address, 'data:', 'blob:', 'chrome'))]

def until(browser, what): return WebDriverWait(browser, 200).until(what)

def darkness(browser):
    red, green, blue = browser.execute_script('return getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)')
    return red + green + blue < 3*100

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_page(browser, address, path):
    "No fault in any of the three views; nothing wider than a phone; the mode that the reader's system prefers"
    faults(browser, address)
    for width,dark in ((1280, False), (1280, True), (390, False)):
        view(browser, width, dark)
        browser.get(address + page_of(path))
        assert darkness(browser) == dark
        wide = browser.execute_script('return document.documentElement.scrollWidth')
        assert wide <= width, f'{name(path)} is {wide} pixels wide in a window of {width}'
    assert not (found := faults(browser, address)), found

@pytest.mark.parametrize('where', ['server', 'folder'])
def test_search_finds_a_function(browser, address, site, where):
    "From the web, and from a copy of the site on a stick"
    start = address if where == 'server' else f'{site.as_uri()}/'
    view(browser); browser.get(start + 'index.html'); faults(browser, start)
    box = browser.find_element(By.CSS_SELECTOR, '#quarto-search input')
    box.send_keys('read_her2st')
    until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, '.search-result'))
    results = browser.find_elements(By.CSS_SELECTOR, '.search-result')
    assert any('read_her2st' in r.text for r in results)
    next(r for r in results if 'her2st.html' in r.get_attribute('href')).click()
    until(browser, lambda b: 'library/her2st.html' in b.current_url)
    assert browser.find_element(By.ID, 'read_her2st') and not faults(browser, start)

def test_dark_mode_holds(browser, address):
    view(browser); browser.get(address + 'index.html')
    assert not darkness(browser)
    browser.find_element(By.CSS_SELECTOR, '.quarto-color-scheme-toggle').click()
    until(browser, darkness)
    browser.get(address + 'library/attention.html')
    assert darkness(browser)
    browser.find_element(By.CSS_SELECTOR, '.quarto-color-scheme-toggle').click()
    until(browser, lambda b: not darkness(b))
    browser.get(address + 'index.html')
    assert not darkness(browser)

def test_maths_is_set(browser, address):
    "Formulas are laid out, in their own fonts, which the site brings along"
    view(browser); browser.get(address + 'library/attention.html')
    until(browser, lambda b: b.execute_script("return document.fonts.status == 'loaded'"))
    boxes = browser.execute_script("return [...document.querySelectorAll('.katex-html')].map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])")
    assert boxes and all(w > 0 and h > 0 for w,h in boxes)
    assert browser.execute_script("return [...document.fonts].some(f => f.family.includes('KaTeX') && f.status == 'loaded')")
    assert '$$' not in browser.find_element(By.TAG_NAME, 'main').text

def test_code_is_copied(browser, address):
    view(browser); browser.get(address + 'index.html')
    browser.execute_cdp_cmd('Browser.grantPermissions', dict(permissions=['clipboardReadWrite', 'clipboardSanitizedWrite'], origin=address.rstrip('/')))
    button = browser.find_element(By.CSS_SELECTOR, '.code-copy-button')
    browser.execute_script('arguments[0].scrollIntoView({block: "center"}); arguments[0].click()', button)
    until(browser, lambda b: 'code-copy-button-checked' in button.get_attribute('class'))
    code = browser.execute_script('return arguments[0].parentElement.querySelector("pre code").innerText', button)
    assert code.strip() and browser.execute_async_script('navigator.clipboard.readText().then(arguments[0])') == code

def titles(browser): return browser.execute_script("return Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.type == 'Figure').map(f => f.title.text)")

def inside(browser, selector):
    "Elements in the interactive figures, which keep theirs in shadow roots"
    return browser.execute_script("""const look = root => [...root.querySelectorAll('*')].flatMap(e => [...(e.matches(arguments[0]) ? [e] : []), ...(e.shadowRoot ? look(e.shadowRoot) : [])])
        return look(document)""", selector)

@pytest.fixture
def explore(browser, address):
    view(browser); browser.get(address + 'library/explore.html'); faults(browser, address)
    until(browser, lambda b: len(inside(b, 'canvas')) >= 2)
    yield browser
    assert not faults(browser, address)

def test_attention_explorer_answers_a_tap(explore):
    before = titles(explore)[0]
    figure = inside(explore, '.bk-Figure')[0]
    explore.execute_script('arguments[0].scrollIntoView({block: "center"})', figure)
    ActionChains(explore).move_to_element_with_offset(figure, -150, -100).click().perform()
    until(explore, lambda b: titles(b)[0] != before)
    tapped, layers = titles(explore)[0], inside(explore, 'select')[0]
    explore.execute_script('arguments[0].value = "2"; arguments[0].dispatchEvent(new Event("change"))', layers)
    until(explore, lambda b: 'layer 2' in titles(b)[0])
    assert titles(explore)[0].split(',')[0] == tapped.split(',')[0]                       # still the tapped spot

def test_resolution_slider_moves(explore):
    assert titles(explore)[1].endswith('measured')
    handle = inside(explore, '.noUi-handle')[0]
    explore.execute_script('arguments[0].scrollIntoView({block: "center"})', handle)
    handle.send_keys(Keys.END)                                                           # to the finest; a drag would miss a page that is still moving
    until(explore, lambda b: titles(b)[1].endswith('truth'))
    shown = explore.execute_script("return Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.type == 'GlyphRenderer' && ['Rect', 'Circle'].includes(m.glyph.type) && m.visible).length")
    assert shown == 2*2 + 2*1                                                            # spots and target of each explorer; one level of each slider
