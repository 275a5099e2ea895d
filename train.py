"""Entry point: ``python train.py fit --config configs/quickstart.yaml``."""

from mh_lightning.commands import main

if __name__ == "__main__":
    main()
