"""``vera-fx serve``: a classifier's folder and a folder of adapters, over HTTP."""

import importlib.util
from pathlib import Path
from typing import Any

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.checkpoint.store import AdapterStore
from vera_fx.cli.folders import load
from vera_fx.cli.inspect import is_adapter
from vera_fx.errors import ConfigError

_KIND = "first of the store"  # the adapter that gives the model its branches


def serve(model: Path, folder: Path, *, host: str, port: int, **sizes: int) -> None:
    """Serve until interrupted; requests that wait are answered first.

    Raises:
        ConfigError: the key is too short, a library is missing, or a folder holds something else.
    """
    from vera_fx.serving.limits import Limits, key_for_changes

    key = key_for_changes()
    _check_installed()
    import uvicorn

    from vera_fx.serving.door import server_options

    limits = Limits()
    app = application(model, folder, key=key, limits=limits, **sizes)
    uvicorn.run(app, host=host, port=port, **server_options(limits))


def application(
    model: Path, folder: Path, *, key: str | None, limits: Any, capacity: int, length: int
) -> Any:
    """The application over both folders.

    Raises:
        ConfigError: the model is no classifier, or the store holds no adapter to begin with.
    """
    from transformers import AutoTokenizer

    from vera_fx.serving.app import create_app
    from vera_fx.serving.classify import classifier, warm_up

    first = _first(folder)
    base = load(model)
    if not type(base).__name__.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"serve answers for classifiers of texts, but {str(model)!r} is a {type(base).__name__}"
        )
    labels = [base.config.id2label[index] for index in range(base.config.num_labels)]
    load_adapter(base, first, adapter_name=_KIND)
    store = AdapterStore(base, folder, capacity=capacity)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    classify = classifier(base, tokenizer, length=length)
    warm_up(classify, store)
    options = {"key": key, "limits": limits, "max_batch": min(32, capacity)}
    return create_app(classify, store, labels, **options)


def _check_installed() -> None:
    for library in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"{library} is not installed; pip install 'vera-fx[server]'")


def _first(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if is_adapter(path)) if folder.is_dir() else []
    if not found:
        raise ConfigError(
            f"{str(folder)!r} holds no adapter; give a folder with a folder for each adapter, as "
            "save_adapter writes it"
        )
    return found[0]
