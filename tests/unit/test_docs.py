"""Documents and programs are short where they must be; documents are true of the tree: links, files, options."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from alternatives.dpo.config import DPOConfig
from common.config.parser import Config, options
from common.paths import ROOT
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
ARCHITECTURE = ROOT / "docs/architecture.md"
LISTED_PACKAGES = ("common", "step1_sft", "step2_reward", "step3_ppo", "alternatives", "inference", "launch")
# Of programs that are not this project's (deepspeed's launcher, pytest, ruff, llama.cpp's converter), and the examples
# of docs/flags.md.
OTHER_OPTIONS = {"num_gpus", "log_level", "check", "long", "outfile", "outtype", "flag", "no_flag"}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(document: Path) -> str:
    """The text without blocks of code, in which brackets are not links and # is no heading."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def listed_files() -> set[str]:
    """The files in the tables of docs/architecture.md, each under a heading that names its directory."""
    files: set[str] = set()
    directory = None
    for line in prose(ARCHITECTURE).splitlines():
        if re.match(r"#+ ", line):
            named = re.search(r"`([\w/]+/)`", line)
            directory = named and named[1]
        elif directory and (cell := re.match(r"\| (`[^|]*`) \|", line)):
            files |= {directory + name for name in re.findall(r"`([^`]+)`", cell[1])}
    return files


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_relative_links_lead_somewhere(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_architecture_lists_files_that_exist():
    assert [name for name in sorted(listed_files()) if not (ROOT / name).is_file()] == []


def test_the_architecture_lists_every_module():
    modules = {
        str(path.relative_to(ROOT))
        for package in LISTED_PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(modules - listed_files()) == []


def test_the_documents_name_options_that_exist():
    known = set(OTHER_OPTIONS)
    for path in [*ROOT.glob("step*/*.py"), *ROOT.glob("inference/*.py"), *ROOT.glob("benchmarks/*.py")]:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for config in subclasses(Config):
        for name, option in options(config).items():
            known |= {name, *option.aliases} | ({f"no_{name}"} if option.kind is bool else set())
    for script in [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.py"), *ROOT.glob("benchmarks/proof/*.py")]:
        known |= set(re.findall(r"--(\w+)", script.read_text(encoding="utf-8")))
    unknown = {
        f"{document.relative_to(ROOT)}: --{name}"
        for document in DOCUMENTS
        for name in re.findall(r"(?<![\w-])--([A-Za-z]\w*)", document.read_text(encoding="utf-8").replace("-----", ""))
        if name not in known
    }
    assert sorted(unknown) == []


def test_what_may_change_on_resume_is_listed():
    page = prose(ROOT / "docs/interrupted-runs.md")
    table = page[page.index("## What may change") : page.index("## Another number of ranks")]
    listed = set(re.findall(r"`--(\w+)`", table))
    may_change = {
        name
        for config in (SFTConfig, RewardConfig, DPOConfig, PPOConfig)
        for name, option in options(config).items()
        if option.may_change_on_resume and not option.ignored
    }
    assert listed == may_change


@pytest.mark.parametrize("step", ["step1_sft", "step2_reward", "step3_ppo", "alternatives/dpo"])
def test_the_main_of_each_step_fits_on_a_screen(step):
    tree = ast.parse((ROOT / step / "main.py").read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno is not None and main.end_lineno - main.lineno + 1 <= 40


def subclasses(parent: type) -> list[type]:
    return [kind for child in parent.__subclasses__() for kind in (child, *subclasses(child))]


def test_no_test_file_imports_another():
    """What several need lies beside them, in a module without tests."""
    files = list((ROOT / "tests").rglob("*.py"))
    importing = [path for path in files if re.search(r"^\s*(from|import) tests\.\S*\btest_", path.read_text(), re.M)]
    assert names(importing) == []


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by it; two of one name stop the collection of the whole suite."""
    files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(files) if files.count(name) > 1) == []
