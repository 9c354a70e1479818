from paperlib.cli import main

main()
