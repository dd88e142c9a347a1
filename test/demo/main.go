// Command demo shows the main job of imps on a real API server, and ends by itself: `make demo`.
//
// It runs the real binary with the identities that the chart gives it, and judges imps by what an
// independent watcher and the audit log say. Everything that it makes is gone when it ends, also
// after Ctrl-C.
package main

import (
	"context"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

func main() {
	// SIGPIPE: whoever reads the output is gone, and there is still something to clean up.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	d := &demo{printer: printer{os.Stdout}, keep: os.Getenv("KEEP") == "1"}
	play := d.play
	if slices.Equal(os.Args[1:], []string{"get", "imps"}) {
		play = d.get
	}
	code := play(ctx)
	stop()
	os.Exit(code)
}
