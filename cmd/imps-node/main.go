// Command imps-node runs the duties of imps, and shows beforehand what a resource would do.
//
// It only wires: what the duties decide is in pkg/sync.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
)

// version is set when imps-node is built: -ldflags "-X main.version=...".
var version = "dev"

// Exit codes.
const (
	exitOK = iota
	exitError
	exitConflicts
)

var (
	// errReported ends the process after an error that the log has told already.
	errReported = errors.New("reported")
	// errConflicts ends the process after a plan with conflicts, which the output has told.
	errConflicts = errors.New("the plan has conflicts")
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // a few MiB are alive, on every node; the CPU time that this costs does not show
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCommand(getenv)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errConflicts):
		return exitConflicts
	case errors.Is(err, errReported):
		return exitError
	}
	_, _ = fmt.Fprintln(stderr, "imps-node:", strings.ReplaceAll(err.Error(), "\n", "; ")) // nothing is left to tell it to
	return exitError
}
