"""Read a built site as a browser without a network would: what does it ask for that is not there?"""
import re, sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

external = re.compile(r'(?:https?:)?//', re.I)
css_url = re.compile(r'''url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)''')
text_link = re.compile(r'\]\([^()\s]+\)?')
script_url = re.compile(r'''(?:import|from|fetch\(|src\s*=|href\s*=)\s*\(?['"]((?:https?:)?//[^'"]+)''')


class Page(HTMLParser):
    """The ids of a page, its links, what it loads, how many figures and formulas it shows,
    what looks like a link but is text, and how many table headers lack a scope"""
    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.loads, self.figures, self.inside = set(), [], [], 0, []
        self.title, self.maths, self.text_links, self.unscoped = '', 0, [], 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        cls = a.get('class', '').split()
        in_maths = bool(self.inside) and self.inside[-1][1]
        self.inside.append((tag, in_maths or 'katex' in cls))
        self.ids |= {a[k] for k in ('id', 'name') if k in a}
        if tag == 'a' and 'href' in a: self.links.append(a['href'])
        if tag == 'link' and a.get('rel', '') not in ('canonical', 'alternate'): self.loads.append(a.get('href', ''))
        if tag in ('script', 'img', 'iframe', 'source', 'video', 'audio', 'embed') and a.get('src'): self.loads.append(a['src'])
        if tag == 'object' and a.get('data'): self.loads.append(a['data'])
        self.loads += [o.split()[0] for o in a.get('srcset', '').split(',') if o.strip()]
        self.loads += css_urls(a.get('style', ''))
        if tag in ('img', 'svg') and not in_maths: self.figures += 1    # KaTeX draws roots as svg
        if 'katex' in cls: self.maths += 1
        if tag == 'th' and not a.get('scope'): self.unscoped += 1

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.inside.pop()

    def handle_endtag(self, tag):
        while tag in (t for t, _ in self.inside) and self.inside.pop()[0] != tag: pass

    def handle_data(self, data):
        tag = self.inside[-1][0] if self.inside else ''
        if tag == 'style': self.loads += css_urls(data)
        if tag == 'script': self.loads += script_url.findall(data)
        if tag == 'title': self.title += data
        if not {'pre', 'code', 'script', 'style', 'annotation', 'textarea'} & {t for t,_ in self.inside}: self.text_links += text_link.findall(data)


@cache
def parsed(html): return Page(html)

def read_page(file):
    "A page; what was parsed before is not parsed again"
    return parsed(file.read_text(encoding='utf-8'))

def css_urls(css): return [a or b for a, b in css_url.findall(css)]

def target(site, file, href):
    "The file of the site that `href`, written in `file`, points at, and the anchor in it"
    path, anchor = urldefrag(href)
    to = (file.parent/unquote(path.split('?')[0])).resolve() if path else file
    return (to/'index.html' if to.is_dir() else to), unquote(anchor)

def check_site(site):
    "The faults of the site in the folder `site`: one line each, with the page where it is."
    site = Path(site).resolve()
    pages = {f: read_page(f) for f in sorted(site.rglob('*.html'))}
    faults = [] if pages else [f'{site.name}: there is no page']
    def say(file, what): faults.append(f'{file.relative_to(site)}: {what}')

    def check(file, href, loaded):
        if href.startswith('data:'): return
        if external.match(href):
            if loaded: say(file, f'loads {href} from the network')
            return
        if re.match(r'[a-z][a-z0-9+.-]*:', href, re.I): return
        if href.startswith('/'): return say(file, f'{href} is not relative, so a copy of the site elsewhere loses it')
        to, anchor = target(site, file, href)
        if site not in to.parents: return say(file, f'{href} is outside the site')
        if not to.is_file(): return say(file, f'{href} is not there')
        if anchor and to in pages and anchor not in pages[to].ids: say(file, f'{href}: the page has no #{anchor}')

    for file, page in pages.items():
        for text in page.text_links: say(file, f'a link shows as text: {text}')
        if page.unscoped: say(file, f'{page.unscoped} headers of tables do not say what they head (scope)')
        for href in dict.fromkeys(page.links): check(file, href, False)
        for href in dict.fromkeys(page.loads): check(file, href, True)
    for file in sorted(site.rglob('*.css')):
        for href in dict.fromkeys(css_urls(file.read_text(encoding='utf-8'))): check(file, href, True)
    return faults


if __name__ == '__main__':
    faults = check_site(sys.argv[1])
    print('\n'.join(faults) or f'{sys.argv[1]}: nothing missing, nothing loaded from a network')
    sys.exit(bool(faults))
