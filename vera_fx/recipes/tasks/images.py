"""Classes of pictures: a folder for each class, or columns ``image`` and ``label``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from vera_fx.errors import ConfigError, first_line, shown
from vera_fx.recipes.base_models import Base, load_base, load_image_processor
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks.classifier import Classifier
from vera_fx.recipes.tasks.labels import label_fields
from vera_fx.recipes.tasks.protocol import Batch, Row


class Images(Classifier):
    """A `Task`; pictures are paths, or what ``datasets`` decodes."""

    task_type: ClassVar[str | None] = None  # PEFT's word for classifiers is for texts

    @classmethod
    def asks(cls, there: Sequence[str]) -> tuple[str, ...]:
        """The picture."""
        del there
        return ("image",)

    def row_of(self, text: str) -> Row:
        """None: it takes no texts."""
        raise ConfigError(
            f"a run on images predicts from pictures, not from {shown(text)}; give a file or a folder"
        )

    @classmethod
    def processor_of(cls, recipe: Recipe) -> Any:
        """The model's image processor."""
        return load_image_processor(recipe.model)

    def load(self) -> Base:
        """A vision model with a head for the classes."""
        return load_base(
            self.recipe, "AutoModelForImageClassification", **label_fields(self.classes)
        )

    def inputs(self, rows: Sequence[Row]) -> Batch:
        """``pixel_values``, ``(rows, channels, height, width)``."""
        pictures = [_picture(row["image"], self.recipe.data) for row in rows]
        return dict(self.processor(images=pictures, return_tensors="pt"))


def _picture(image: Any, beside: Path) -> Any:
    """A picture in colours; relative paths start where the data is."""
    from PIL import Image

    if not isinstance(image, str):
        if not isinstance(image, Image.Image):
            raise ConfigError(f"an image must be a path or a picture, got {shown(image)}")
        return image.convert("RGB")
    try:
        with Image.open(beside.parent / image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ConfigError(f"the picture {image} cannot be read: {first_line(error)}") from error
