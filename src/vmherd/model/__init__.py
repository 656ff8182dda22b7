"""Pure values and rules: nothing here reads a file, opens a socket or looks at the clock."""
