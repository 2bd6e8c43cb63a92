"""One thin file per stage: reads files, calls the library, writes files. No stage imports another."""
