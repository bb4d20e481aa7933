from lightning_optim.cli.command import main

if __name__ == "__main__":
    main()
