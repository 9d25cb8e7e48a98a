"""The built site in a real browser: every page in light, in dark and on a phone, some by keyboard and on paper,
without an error in the console and without asking for anything from elsewhere."""
import http.server, json, re, shutil, threading
from functools import partial
import numpy as np, pytest
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

def view(browser, width=1280, dark=False, media=''):
    "The window's width, what the reader's system prefers, and `print` for paper"
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600))
    scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(media=media, features=[scheme]))

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

PALE = """
    const parse = s => {
        const [r, g, b, a = 1] = s.match(/[\\d.]+/g).map(Number), k = s.startsWith('color(') ? 255 : 1;
        return [r*k, g*k, b*k, a] };
    const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1 - a[3]));
    const linear = v => v/255 <= .04045 ? v/255/12.92 : ((v/255 + .055)/1.055)**2.4;
    const light = c => c.map(linear).reduce((sum, v, i) => sum + v*[.2126, .7152, .0722][i], 0);
    const behind = e => {
        const up = e.parentElement ? behind(e.parentElement) : {bg: [255, 255, 255], opacity: 1};
        const s = getComputedStyle(e);
        return {bg: over(parse(s.backgroundColor), up.bg), opacity: up.opacity*s.opacity} };
    document.querySelectorAll('details').forEach(d => d.open = true);
    const found = new Set(), seen = new Set();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
        if (!text || seen.has(e) || e.closest('script, style, svg, .katex-mathml')) continue;
        if (!e.checkVisibility({visibilityProperty: true})) continue;
        seen.add(e);
        const {bg, opacity} = behind(e), fg = parse(getComputedStyle(e).color);
        const seenAs = over([...fg.slice(0, 3), fg[3]*opacity], bg);
        const [a, b] = [seenAs, bg].map(light).sort((x, y) => y - x), ratio = (a + .05)/(b + .05);
        if (ratio < 4.5) found.add(`${ratio.toFixed(2)}: ${e.tagName} ${e.className}, "${text.slice(0, 30)}"`);
    }
    return [...found]"""

# What no scroll bar reaches, and code whose lines are broken
CUT = """
    const all = selector => [...document.querySelectorAll(selector)];
    const beyond = e => e.getBoundingClientRect().right > innerWidth + 1;
    const box = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && !beyond(e);
    const reached = e => e.tagName != 'MAIN' && (box(e) || reached(e.parentElement));
    const cut = all('main *').filter(e => beyond(e) && !e.closest('.katex-mathml, svg') && !reached(e));
    const broken = all('main pre, main pre code').filter(e => getComputedStyle(e).whiteSpace != 'pre');
    return [...cut, ...broken].map(e => `${e.tagName} ${e.className}: ${e.textContent.trim().slice(0, 40)}`)"""

@pytest.mark.parametrize('path', notebooks(), ids=name)
def test_page(browser, address, path):
    """No fault in any of the three views; text that stands out from what is behind it; nothing wider than a phone;
    the mode that the reader's system prefers"""
    faults(browser, address)
    for width,dark in ((1280, False), (1280, True), (390, False)):
        view(browser, width, dark)
        browser.get(address + page_of(path))
        assert darkness(browser) == dark
        wide = browser.execute_script('return document.documentElement.scrollWidth')
        assert wide <= width, f'{name(path)} is {wide} pixels wide in a window of {width}'
        if width < 992: assert not (cut := browser.execute_script(CUT)), cut
        else: assert not (pale := browser.execute_script(PALE)), pale
    assert not (found := faults(browser, address)), found

@pytest.mark.parametrize('dark', [False, True])
def test_contrast_of_what_comes_up(browser, address, dark):
    "What a search finds, the result under the pointer, the empty search box, and a link under the pointer"
    view(browser, dark=dark); browser.get(address + 'index.html')
    box = browser.find_element(By.CSS_SELECTOR, '#quarto-search input')
    browser.execute_script('''const i = arguments[0], s = document.createElement("span");
        s.textContent = "Search"; s.style.color = getComputedStyle(i, "::placeholder").color;
        s.style.background = getComputedStyle(i).backgroundColor; document.body.append(s)''', box)
    box.send_keys('read_her2st')
    until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, '.search-result'))
    box.send_keys(Keys.ARROW_DOWN)
    until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, '.search-result.active'))
    pointed_at = 'document.querySelectorAll("main a").forEach(a => a.style.color = "var(--bs-link-hover-color)")'
    browser.execute_script(pointed_at)
    assert not (pale := browser.execute_script(PALE)), pale

def test_keyboard(browser, address):
    "The first press of Tab shows a link to the text, which leads there; where the keyboard is, is seen"
    view(browser); browser.get(address + 'idea/attention.html')
    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.execute_script("""const e = document.activeElement, s = getComputedStyle(e);
            return {text: e.textContent, main: !!e.closest('main'), top: e.getBoundingClientRect().top,
                    outline: s.outlineStyle == 'solid' ? parseFloat(s.outlineWidth) : 0}""")
    first = press(Keys.TAB)
    assert first['text'] == 'Skip to content' and first['top'] >= 0
    assert all(o['outline'] >= 2 and not o['main'] for o in (first, *(press(Keys.TAB) for _ in range(10))))
    browser.get(address + 'idea/attention.html')
    press(Keys.TAB); press(Keys.ENTER)
    reached = [press(Keys.TAB) for _ in range(8)]
    assert all(o['main'] and o['outline'] >= 2 for o in reached), reached
    assert browser.current_url.endswith('#quarto-document-content')

@pytest.mark.parametrize('page', ['idea/sections.html', 'paper/figure2b.html', 'paper/replicated.html'])
def test_no_wider_than_paper(browser, address, page):
    "Tables of long names and of many columns, code and figures: for what is wider, browsers shrink the page"
    view(browser, 700, media='print'); browser.get(address + page)
    wide = browser.execute_script("""return [...document.querySelectorAll('main :is(table, pre, img)')]
        .filter(e => e.getBoundingClientRect().right > 701).map(e => e.textContent.trim().slice(0, 40))""")
    view(browser)
    assert not wide

@pytest.mark.parametrize('page', ['idea/training.html', 'paper/replicated.html'])
def test_on_paper(browser, address, page):
    """The page alone, in dark mode too in black on white; code wrapped and folded as it was, figures in one piece,
    the addresses of other sites"""
    view(browser, 700, True, 'print'); browser.get(address + page)
    until(browser, lambda b: b.execute_script("return document.readyState == 'complete'"))
    def of(selector, what):
        return browser.execute_script(f'return [...document.querySelectorAll(arguments[0])].map(e => {what})', selector)
    around = '#quarto-header, #quarto-sidebar, #quarto-margin-sidebar, #quarto-search, #quarto-back-to-top'
    assert not any(of(f'{around}, .skip-link, .page-navigation, .page-links, .code-copy-button', 'e.checkVisibility()'))
    assert not darkness(browser) and not (pale := browser.execute_script(PALE)), pale
    browser.refresh()
    assert set(of('main pre, main pre code', 'getComputedStyle(e).whiteSpace')) == {'pre-wrap'}
    opened = of('details.code-fold', 'e.open')
    assert False in opened and opened == of('details.code-fold', 'e.querySelector("pre").checkVisibility()')
    assert set(of('main :is(img, tr)', 'getComputedStyle(e).breakInside')) == {'avoid'}
    assert set(of('main :is(h2, h3)', 'getComputedStyle(e).breakAfter')) == {'avoid'}
    said = of('main p a:not(:has(code), [style])', '[e.getAttribute("href"), getComputedStyle(e, "::after").content]')
    assert said
    for href,text in said: assert (text != 'none' and href in text) if href.startswith('http') else text == 'none'
    view(browser)

@pytest.mark.parametrize('page', ['workshop/tissue.html', 'workshop/workshop.html', 'idea/evaluation.html'])
def test_hand_out(browser, address, page):
    "Printed, a page has nothing around it, and its hints and answers stand open, which on the screen are folded"
    hints, around = 'main details:not(.code-fold) > :not(summary)', '#quarto-header, #quarto-sidebar, #quarto-margin-sidebar, #quarto-search, .page-navigation, .page-links'
    def seen(selector):
        return browser.execute_script('return [...document.querySelectorAll(arguments[0])].map(e => e.checkVisibility())', selector)
    view(browser); browser.get(address + page)
    assert any(seen(around)) and not any(seen(hints))
    view(browser, 700, media='print')
    assert not any(seen(around)) and all(seen(hints))
    assert seen(hints) or page == 'workshop/workshop.html'
    view(browser)

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
    until(browser, lambda b: 'tissue/her2st.html' in b.current_url)
    assert browser.find_element(By.ID, 'read_her2st') and not faults(browser, start)

def test_dark_mode_holds(browser, address):
    view(browser); browser.get(address + 'index.html')
    assert not darkness(browser)
    browser.find_element(By.CSS_SELECTOR, '.quarto-color-scheme-toggle').click()
    until(browser, darkness)
    browser.get(address + 'idea/attention.html')
    assert darkness(browser)
    browser.find_element(By.CSS_SELECTOR, '.quarto-color-scheme-toggle').click()
    until(browser, lambda b: not darkness(b))
    browser.get(address + 'index.html')
    assert not darkness(browser)

def test_maths_is_set(browser, address):
    "Formulas are laid out, in their own fonts, which the site brings along"
    view(browser); browser.get(address + 'idea/attention.html')
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
    view(browser); browser.get(address + 'judging/explore.html'); faults(browser, address)
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

def focused(browser):
    "What has the focus, also inside figures; how wide its outline is, and what it is called"
    return browser.execute_script("""let e = document.activeElement
        while (e.shadowRoot?.activeElement) e = e.shadowRoot.activeElement
        const s = getComputedStyle(e), label = e.labels?.[0]?.textContent ?? e.ariaLabel
        return {role: e.role ?? e.localName, label, text: e.ariaValueText, outline: s.outlineStyle == 'solid' ? parseFloat(s.outlineWidth) : 0}""")

def test_attention_explorer_by_keyboard(explore):
    "Menus and map are reached with Tab, are seen to be, and say what they are; arrow keys choose a spot in their direction, as far as there are any"
    def press(key):
        ActionChains(explore).send_keys(key).perform()
        return focused(explore)
    explore.execute_script('arguments[0].focus()', inside(explore, 'select')[0])
    layer, head, spot = focused(explore), press(Keys.TAB), press(Keys.TAB)
    assert [layer['label'], head['label']] == ['layer', 'head'] and spot['role'] == 'slider' and 'arrow keys' in spot['label']
    assert head['outline'] >= 2 and spot['outline'] >= 2
    place = lambda: np.array(re.match(r'spot (\d+)x(\d+),', titles(explore)[0]).groups(), dtype=int)
    for key,way in ((Keys.ARROW_RIGHT, (1, 0)), (Keys.ARROW_DOWN, (0, 1)), (Keys.ARROW_LEFT, (-1, 0)), (Keys.ARROW_UP, (0, -1))):
        before = place()
        press(key)
        until(explore, lambda b: (place() != before).any())
        step = place() - before
        assert step @ way > 0 and 2*(step @ way)**2 >= step @ step, 'not in the direction of the key'
        assert focused(explore)['text'] == titles(explore)[0]
    for _ in range(50): press(Keys.ARROW_LEFT)
    rim = titles(explore)[0]
    press(Keys.ARROW_LEFT)
    assert titles(explore)[0] == rim != spot['text']                                     # nothing lies beyond the rim

def test_resolution_slider_moves(explore):
    assert titles(explore)[1].endswith(': HisToGene')
    handle = inside(explore, '.noUi-handle')[0]
    explore.execute_script('arguments[0].scrollIntoView({block: "center"})', handle)
    assert handle.get_attribute('aria-label') == 'resolution: HisToGene'
    handle.send_keys(Keys.END)                                                           # to the finest; a drag would miss a page that is still moving
    until(explore, lambda b: titles(b)[1].endswith(': HisToGene_SR'))
    assert focused(explore)['label'] == 'resolution: HisToGene_SR' and focused(explore)['outline'] >= 2
    shown = explore.execute_script("return Bokeh.documents.flatMap(d => [...d._all_models.values()]).filter(m => m.type == 'GlyphRenderer' && ['Rect', 'Circle'].includes(m.glyph.type) && m.visible).length")
    assert shown == 2*2 + 2*1                                                            # spots and target of each explorer; one level of each slider
