"""A headless Chromium, driven by its command line alone: what a page looks like, measured.

`python -m tests.report.browser docs/explain.png` makes the picture in the docs.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

import vera_fx

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--enable-logging=stderr",
)

_LISTEN = "<script>window.faults=[];addEventListener('error',e=>faults.push(e.message))</script>"
_MEASURE = """<script>addEventListener('load', () => {
  const box = e => { const r = e.getBoundingClientRect();
    return {text: e.textContent, kind: e.getAttribute('class'),
            x: r.left, y: r.top, right: r.right, bottom: r.bottom}; };
  const all = (s, root) => [...root.querySelectorAll(s)].map(box);
  const found = {faults, inner: innerWidth, width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight, title: document.title,
    pictures: [...document.querySelectorAll('svg')].map(svg => ({...box(svg),
      texts: all('text', svg), before: all('rect.base', svg), after: all('rect.site', svg)})),
    rows: all('tr', document)};
  const out = document.createElement('pre');
  out.id = 'measured'; out.textContent = JSON.stringify(found); document.body.append(out);
})</script>"""


def _run(page: str, width: int, height: int, *flags: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        own = (f"--user-data-dir={folder}/profile", f"--window-size={width},{height}")
        command = [str(CHROMIUM), *_FLAGS, *own, *flags, path.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def measured(page: str, width: int = 1060, height: int = 900) -> dict[str, Any]:
    """Where everything is on the page, with what the browser's console said, under ``console``."""
    probed = page.replace("<head>", f"<head>{_LISTEN}{_MEASURE}", 1)
    done = _run(probed, width, height, "--dump-dom")
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = re.findall(r"CONSOLE.*", done.stderr)
    return {**json.loads(html.unescape(found[1])), "console": console}


def screenshot(page: str, path: Path, width: int = 1060, height: int = 900) -> Path:
    """The page as it is seen, as a PNG file."""
    _run(page, width, height, f"--screenshot={path.absolute()}")
    return path


def deep_llama(layers: int = 32, width: int = 64, tokens: int = 40) -> nn.Module:
    """An adapted Llama of many layers, captured but never run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes, **heads)).eval()
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=width // 2, target_modules=targets))
    with torch.no_grad():
        ids = torch.ones(2, tokens // 2, dtype=torch.int64)
        vera_fx.capture(model.eval(), input_ids=ids, use_cache=False)
    return model


if __name__ == "__main__":
    page = vera_fx.explain(deep_llama(width=512, tokens=300)).html()
    screenshot(page, Path(sys.argv[1]), height=1240)
