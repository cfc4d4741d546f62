"""`python -m dinov2cli`, the form that launchers such as `accelerate launch -m` need."""

from dinov2cli.cli.main import main

if __name__ == "__main__":
    main()
