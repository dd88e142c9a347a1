package main

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// inFlight is how many requests plain clients and the set-up have in flight; imps has as
// many.
const inFlight = 32

// call is one request of the bench itself.
type call struct{ sent, replied time.Time }

// callAll calls f for every namespace, at most limit at once where that is above zero, and
// one after each interval where that is above zero, whether or not the ones before have
// come back.
func callAll(ctx context.Context, namespaces []string, limit int, interval time.Duration, f func(context.Context, string) error) (map[string]call, error) {
	group, calling := errgroup.WithContext(ctx)
	if limit > 0 {
		group.SetLimit(limit)
	}
	var ticks <-chan time.Time
	if interval > 0 {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		ticks = ticker.C
	}
	var mu sync.Mutex
	calls := make(map[string]call, len(namespaces))
	for _, namespace := range namespaces {
		if ticks != nil {
			select {
			case <-ticks:
			case <-calling.Done():
			}
		}
		if calling.Err() != nil {
			break
		}
		group.Go(func() error {
			sent := time.Now()
			err := f(calling, namespace)
			replied := time.Now()
			mu.Lock()
			defer mu.Unlock()
			calls[namespace] = call{sent, replied}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return calls, ctx.Err()
}

// pause waits, or returns why it did not.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// await repeats a look until it finds no fault.
func await(ctx context.Context, look func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := look(ctx)
		if err == nil {
			return nil
		}
		if pause(ctx, 50*time.Millisecond) != nil {
			return err
		}
	}
}
