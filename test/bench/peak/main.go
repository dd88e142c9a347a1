// Command peak runs a program and prints its peak memory in KiB, as the last line of standard error. It is a program of its own because
// Linux counts what a parent holds when it starts a program as that program's: only a small parent sees what a small program needs.
package main

import (
	"os"
	"strconv"
	"syscall"
)

func main() {
	files := []*os.File{os.Stdin, os.Stdout, os.Stderr}
	process, err := os.StartProcess(os.Args[1], os.Args[1:], &os.ProcAttr{Env: os.Environ(), Files: files}) //nolint:gosec // what the benchmark has built
	if err != nil {
		fail(err)
	}
	state, err := process.Wait()
	if err != nil {
		fail(err)
	}
	peak := state.SysUsage().(*syscall.Rusage).Maxrss
	_, _ = os.Stderr.WriteString(strconv.FormatInt(peak, 10) + "\n")
	os.Exit(state.ExitCode())
}

func fail(err error) {
	_, _ = os.Stderr.WriteString(err.Error() + "\n")
	os.Exit(1)
}
