package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestNodeDutyRunsOnlyOnTheNodeOfItsToken(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		claim string
		runs  bool
		err   string
	}{
		"a token of the same node":    {claim: "worker-1", runs: true},
		"a token that is of no node":  {claim: "", runs: true},
		"a token of another node":     {claim: "worker-2", err: `--node-name is "worker-1", but the token is bound to node "worker-2": set it to the Pod's spec.nodeName`},
		"names are compared as given": {claim: "Worker-1", err: `--node-name is "worker-1", but the token is bound to node "Worker-1": set it to the Pod's spec.nodeName`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ran := false
			d := &boundDuty{
				duty:  fakeDuty{run: func(context.Context) error { ran = true; return nil }},
				node:  "worker-1",
				claim: func(context.Context) (string, error) { return test.claim, nil },
				log:   discard(),
			}
			err := d.Run(t.Context())
			require.Equal(t, test.runs, ran)
			if test.err == "" {
				require.NoError(t, err)
			} else {
				require.EqualError(t, err, test.err)
			}
		})
	}
}

func TestNodeDutyOutlivesAnAPIServerThatIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var logs bytes.Buffer
		start, tries, longest := time.Now(), 0, time.Duration(0)
		last := start
		d := &boundDuty{
			duty: fakeDuty{run: func(context.Context) error { return nil }},
			node: "worker-1",
			claim: func(context.Context) (string, error) {
				tries++
				longest, last = max(longest, time.Since(last)), time.Now()
				if time.Since(start) < time.Hour {
					return "", errors.New("connection refused")
				}
				return "worker-1", nil
			},
			log: slog.New(slog.NewTextHandler(&logs, nil)),
		}
		require.NoError(t, d.Run(t.Context()))
		require.Less(t, longest, 40*time.Second)
		require.Less(t, tries, 140, "with backoff")
		require.Equal(t, 2, strings.Count(logs.String(), "\n"), "one line when it fails, and one when it works")
		require.Contains(t, logs.String(), `level=WARN msg="cannot ask the API server which node the token is bound to, trying again until it answers" error="connection refused"`)
		require.Contains(t, logs.String(), "level=INFO")
	})
}

func TestNodeDutyStopsWhileItWaitsForTheAPIServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		d := &boundDuty{
			duty:  fakeDuty{run: func(context.Context) error { return errors.New("must not run") }},
			claim: func(context.Context) (string, error) { return "", errors.New("connection refused") },
			log:   discard(),
		}
		require.NoError(t, d.Run(ctx))
	})
}
