from . import main

if __name__ == "__main__":  # not in the ranks, which import this again
    raise SystemExit(main())
