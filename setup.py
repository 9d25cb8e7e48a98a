"""The package is described once, in settings.ini; this file hands that description to setuptools."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here/'settings.ini', encoding='utf-8')
about = config['DEFAULT']

setup(
    name=about['lib_name'], version=about['version'], description=about['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8').replace('](nbs/', f"](https://raw.githubusercontent.com/{about['user']}/{about['repo']}/{about['branch']}/nbs/"), long_description_content_type='text/markdown',
    author=about['author'], author_email=about['author_email'], url=about['git_url'], license='Apache-2.0',
    keywords=about['keywords'].split(), python_requires=f">={about['min_python']}",
    packages=find_namespace_packages(include=['histogene_nb', 'histogene_nb.*'], exclude=['*.__pycache__']), include_package_data=True,
    install_requires=about['requirements'].split(), extras_require={k: about[f'{k}_requirements'].split() for k in ('dev', 'ray', 'spatialdata', 'parquet')},
    entry_points={'console_scripts': about['console_scripts'].split(),
                  'nbdev': [f"{about['lib_name']}={about['lib_name']}._modidx:d"]},
    zip_safe=False)
