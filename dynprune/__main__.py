from dynprune.cli.program import main

main()
