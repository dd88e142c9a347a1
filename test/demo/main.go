// Command demo shows the main job of imps on a real API server, and ends by itself: `make demo`.
//
// It runs the real binary with the identities that the chart gives it, and judges imps by what an
// independent watcher and the audit log say. Everything that it makes is gone when it ends, also
// after Ctrl-C.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

func main() {
	// Processes that die with the demo are tied to the thread that started them: this one, which
	// lives as long as the demo does.
	runtime.LockOSThread()
	// SIGPIPE: whoever reads the output is gone, and there is still something to clean up.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	code := run(ctx, os.Getenv, os.Stdout)
	stop()
	os.Exit(code)
}

// run is the whole demo; it returns the exit code.
func run(ctx context.Context, getenv func(string) string, out io.Writer) int {
	d := &demo{
		printer: printer{out},
		keep:    getenv("KEEP") == "1",
		patient: getenv("LINGER") == "1",
	}
	return d.play(ctx)
}
