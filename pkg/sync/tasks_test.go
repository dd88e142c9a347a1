package sync

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// secretError is an error whose text is a credential.
type secretError struct{ text string }

func (e secretError) Error() string { return e.text }

func explode(value any) { panic(value) }

func TestRunTasksWaitsForAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		wait := func(d time.Duration) func(context.Context) error {
			return func(ctx context.Context) error {
				select {
				case <-time.After(d):
					return nil
				case <-ctx.Done():
					return errors.New("the end of one task is no end of the others")
				}
			}
		}
		require.NoError(t, RunTasks(t.Context(), wait(time.Second), wait(3*time.Second), wait(2*time.Second)))
		require.Equal(t, 3*time.Second, time.Since(start))
		require.NoError(t, RunTasks(t.Context()))
	})
}

func TestTheFirstErrorEndsTheOtherTasks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first := errors.New("first")
		start := time.Now()
		cleaned := false
		err := RunTasks(t.Context(),
			func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(time.Second) //nolint:forbidigo // fake time: what takes a while to end
				cleaned = true
				return errors.New("second")
			},
			func(context.Context) error {
				<-time.After(time.Minute)
				return first
			})
		require.Equal(t, first, err)
		require.True(t, cleaned, "it waits for all")
		require.Equal(t, time.Minute+time.Second, time.Since(start))
	})
}

func TestTasksEndWithTheContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wait := func(ctx context.Context) error {
		<-ctx.Done()
		return nil
	}
	require.NoError(t, RunTasks(ctx, wait, wait))
}

func TestAPanicIsAnErrorThatDoesNotSayItsValue(t *testing.T) {
	t.Parallel()
	for name, value := range map[string]any{
		"a string":   canary,
		"an error":   errors.New(canary),
		"a type":     secretError{canary},
		"a pointer":  &secretError{canary},
		"a Stringer": fmt.Errorf("x: %w", secretError{canary}),
		"bytes":      []byte(canary),
		"a map":      map[string]string{canary: canary},
	} {
		ended := false
		err := RunTasks(t.Context(),
			func(context.Context) error { explode(value); return nil },
			func(ctx context.Context) error {
				<-ctx.Done()
				ended = true
				return nil
			})
		require.Error(t, err, name)
		require.True(t, ended, "the other tasks end with it")
		for e := err; e != nil; e = errors.Unwrap(e) {
			requireSilent(t, fmt.Sprintf("%v %+v %#v", e, e, e))
		}
		require.ErrorContains(t, err, fmt.Sprintf("panic of type %T", value), name)
		require.ErrorContains(t, err, "tasks_test.go", "where it was")
		require.ErrorContains(t, err, "sync.explode", "where it was")
	}
}

func TestAPanicOfTheRuntimeIsAnError(t *testing.T) {
	t.Parallel()
	var none map[string]int
	err := RunTasks(t.Context(), func(context.Context) error { none["x"] = 1; return nil })
	require.ErrorContains(t, err, "panic of type runtime")
	require.ErrorContains(t, err, "tasks_test.go")
}

func TestWithGraceEndsLaterThanItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		type key struct{}
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
		graceful, stop := WithGrace(ctx)
		defer stop()
		require.Equal(t, "value", graceful.Value(key{}))

		<-time.After(time.Hour)
		require.NoError(t, graceful.Err(), "not before its context ends")
		cancel()
		start := time.Now()
		<-graceful.Done()
		require.Equal(t, Grace, time.Since(start))
		require.ErrorIs(t, graceful.Err(), context.Canceled)
	})
}

func TestWithGraceEndsAtOnceWhenNothingIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		graceful, stop := WithGrace(ctx)
		cancel()
		synctest.Wait()
		require.NoError(t, graceful.Err())
		stop()
		require.Error(t, graceful.Err())
		synctest.Wait()

		graceful, stop = WithGrace(t.Context())
		stop()
		require.Error(t, graceful.Err())
		require.Equal(t, start, time.Now(), "no time has passed")
		// Nothing is left behind: the bubble would not end.
	})
}

func TestWithGraceOfAContextThatHasEnded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		graceful, stop := WithGrace(ctx)
		defer stop()
		require.NoError(t, graceful.Err())
		<-graceful.Done()
		require.Equal(t, Grace, time.Since(start))
	})
}
