from dynprune.cli.app import main

main()
