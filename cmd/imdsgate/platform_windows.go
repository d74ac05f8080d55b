package main

// platformLong ends the help of all.
const platformLong = "\n" + honesty
