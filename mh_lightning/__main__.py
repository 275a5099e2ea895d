"""``python -m mh_lightning fit --config experiment.yaml``: the command line without a script."""

from mh_lightning.commands import main

if __name__ == "__main__":
    main()
