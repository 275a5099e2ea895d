"""Streams over folders of images in several domains, such as photographs and sketches of the same classes."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mh_lightning.data.image_folder import ImageFolder, check_images_of
from mh_lightning.data.labelled import Labelled
from mh_lightning.data.listing import SPLITS, class_names_in, class_names_of_splits, list_images
from mh_lightning.data.splits import Splits, concatenate
from mh_lightning.errors import UserError

LAYOUT_OF_DOMAINS = "root/<domain>/train/<class>/ and root/<domain>/test/<class>/"


class DomainFolder(ImageFolder):
    """Stream of images in ``root/<domain>/train/<class>/...`` and ``root/<domain>/test/<class>/...``, as PACS,
    Office-Home and CORe50 can be laid out, for the scenarios "DI", "CDI" and "CI"; all domains have the same classes,
    which are in alphabetical order. Files are found and read as by `ImageFolder`.

    Args:
        root: the folder above the domains.
        domains: names of the folders to use, in the order of the stream; by default all, in alphabetical order.
        check_images: decode each image once before training.
        ground: colour that transparent pixels lie on.
        upright: turn photographs as their EXIF orientation says.
        stream_options: options of `StreamDataModule`.
    """

    split_options: ClassVar[tuple[str, ...]] = (*ImageFolder.split_options, "domains")

    def __init__(
        self,
        root: str,
        domains: list[str] | None = None,
        check_images: bool = True,
        ground: str = "white",
        upright: bool = True,
        **stream_options: Any,
    ) -> None:
        super().__init__(root, check_images, ground, upright, **stream_options)
        self.domains = domains
        if domains is not None and len(set(domains)) < max(len(domains), 1):
            raise UserError(f"data.domains must name at least one folder, each once, got {domains}.")

    def load(self) -> Splits:
        """List the images of each domain and, if asked to, try them."""
        root = Path(self.root).expanduser()
        found = class_names_in(root, LAYOUT_OF_DOMAINS)
        missing = next((name for name in self.domains or () if name not in found), None)
        if missing is not None:
            raise UserError(f"data.domains: {str(root)!r} has no folder {missing!r}; it has {', '.join(found)}.")
        domains = found if self.domains is None else self.domains
        names_of = {domain: class_names_of_splits(root / domain, LAYOUT_OF_DOMAINS) for domain in domains}
        names = names_of[domains[0]]
        for domain, others in names_of.items():
            if others != names:
                differ = min(set(names) ^ set(others))
                raise UserError(
                    f"data.root={self.root!r}: all domains must hold the same classes; {differ!r} is not in both "
                    f"{domains[0]!r} and {domain!r}."
                )
        parts: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
        for number, domain in enumerate(domains):
            listed = list_images([root / domain / split for split in SPLITS], names)
            for split, samples in zip(SPLITS, listed, strict=True):
                of_domain = np.full(len(samples.labels), number, dtype=np.int64)
                parts[split].append(samples._replace(domains=of_domain, reading=self._reading))
        train, test = (concatenate(parts[split]) for split in SPLITS)
        if self.check_images:
            check_images_of(train, test)
        return Splits(train, test, names)
