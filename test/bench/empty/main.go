// Command empty does nothing: what remains is what it costs to start any program written in Go.
package main

func main() {}
