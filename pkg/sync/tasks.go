package sync

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
)

// Grace is how long what is in flight may take to end after a stop was asked for.
const Grace = 5 * time.Second

// RunTasks runs the tasks side by side and waits for all of them. The first error cancels
// the context of the others, and is returned. A panic becomes an error with the place
// where it happened; its value is left out, since it may hold anything.
func RunTasks(ctx context.Context, tasks ...func(context.Context) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, task := range tasks {
		group.Go(func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic of type %T at:\n%s", p, debug.Stack())
				}
			}()
			return task(ctx)
		})
	}
	return group.Wait()
}

// WithGrace returns a context that ends Grace after ctx does: what is in flight then may
// still finish. The caller calls stop once nothing is left.
func WithGrace(ctx context.Context) (graceful context.Context, stop context.CancelFunc) {
	graceful, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, func() {
		timer := time.NewTimer(Grace)
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel()
		case <-graceful.Done():
		}
	})
	return graceful, func() {
		unhook()
		cancel()
	}
}
