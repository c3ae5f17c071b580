from dynprune.cli import main

main()
