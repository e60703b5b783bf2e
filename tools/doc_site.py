"""What mkdocs.yml asks for beside docs/: pages of the Python API, and pages of files outside of docs/.

mkdocs calls the functions that begin with `on_`. The page of a module is what `API` says of it: which names,
in which order; their text is their docstrings. README, CONTRIBUTING and CHANGELOG become pages, too; other
links that leave docs/ become the names of what they lead to, which must be there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# File outside of docs/ -> the page that it becomes.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Page -> title, what it is about, examples, names of the package; each in order.
API: dict[str, tuple[str, str, str, str]] = {
    "tune": (
        "Tune and build",
        "From this CPU and a model's shapes to a library.",
        "tune.py build.py",
        """
        api.tune api.build api.load api.verify api.export api.merge api.render_source api.bench_kernels
        api.KernelTiming search.TuningResult formats.config.find_model formats.config.load_models
        formats.config.ModelPreset
        """,
    ),
    "multiply": (
        "Multiply",
        "A library from numpy: weights packed once, sums exact.",
        "linear.py",
        "runtime.load runtime.KernelTable runtime.Linear runtime.KernelInfo runtime.Groups",
    ),
    "text": (
        "Text",
        "A model that is asked for text.",
        "llm.py serve.py",
        """
        llm.LLM inference.generation.Generation inference.sampling.Sampling inference.scheduler.Timings
        tokenizer.tokenizer.Tokenizer progress.Progress
        """,
    ),
    "others": (
        "In other people's tools",
        "transformers and lm-evaluation-harness on bitgen's kernels.",
        "optimize.py",
        """
        hf.layers.optimize hf.layers.restore hf.layers.optimized hf.checkpoints.install
        hf.checkpoints.uninstall hf.operator lm_eval.BitgenLM inference.likelihood.likelihoods
        """,
    ),
    "machine": (
        "The machine",
        "What this CPU is, what energy it takes, and the errors that say what was wrong.",
        "",
        """
        cpu.detect_cpu cpu.resolve_isas cpu.load_isas cpu.Cpu cpu.Isa energy.open_source energy.Meter
        energy.Spent errors.BitgenError errors.UsageError errors.UnsupportedError errors.ToolchainError
        errors.FileError errors.InterruptError
        """,
    ),
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=moved((ROOT / name).read_text("utf-8"), name)))
    for name in API:
        files.append(File.generated(config, f"reference/api/{name}.md", content=api_page(name)))
    index = "".join(f"- [{title}]({name}.md): {about}\n" for name, (title, about, *_) in API.items())
    text = f"# Python API\n\nFrom the docstrings of this version.\n\n{index}"
    files.append(File.generated(config, "reference/api/index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to pages, or nowhere; `moved` did so for pages from elsewhere."""
    return markdown if page.file.generated_by else moved(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, **_: Any) -> str:
    """The two colons that announce code in a docstring are no text."""
    return html.replace("<p>::</p>\n", "").replace("::</p>\n", ":</p>\n")


def api_page(name: str) -> str:
    """The page of a part of the API: its examples, then the docstrings of its names."""
    title, about, examples, names = API[name]
    parts = [f"# {title}", about]
    for example in examples.split():
        text = (ROOT / "examples" / "python" / example).read_text("utf-8")
        parts.append(f"`examples/python/{example}`:\n\n```python\n{text}```")
    return "\n\n".join([*parts, *(f"::: bitgen.{each}" for each in names.split())]) + "\n"


def moved(text: str, name: str) -> str:
    """The text of a file, ``name`` from the root, with links for the place that it has among the pages."""
    folder = posixpath.dirname(name)
    page = OUTSIDE.get(name) or name.removeprefix("docs/")

    def link(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"\w+:", target):
            return found[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / file).exists():
            return found[0]  # mkdocs says that it leads nowhere
        if file in OUTSIDE:
            file = f"docs/{OUTSIDE[file]}"
        if file.startswith("docs/"):
            inside = "index.md" if file == "docs/README.md" else file.removeprefix("docs/")
            at = posixpath.relpath(inside, posixpath.dirname(page) or ".")
            return f"{image}[{words}]({at}{mark}{anchor})"
        return f"{words} (`{file}`)"

    parts, at = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, _LINK.sub(link, text[at:])])
