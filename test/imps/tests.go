package imps

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// RunTests runs the tests of a package on a control plane of their own, with imps installed, and returns the exit code.
// prepare builds what they run, into a folder that goes with them. root is the folder of the repository; values are the
// chart's, as Install takes them.
func RunTests(m *testing.M, root string, control **cluster.Cluster, prepare func(ctx context.Context, dir string) error, values ...string) int {
	code, err := runTests(context.Background(), m, root, control, prepare, values)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func runTests(ctx context.Context, m *testing.M, root string, control **cluster.Cluster, prepare func(ctx context.Context, dir string) error, values []string) (code int, err error) {
	dir, err := os.MkdirTemp("", "imps-test-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err = prepare(ctx, dir); err != nil {
		return 1, err
	}
	if *control, err = cluster.Run(ctx); err != nil {
		return 1, err
	}
	if err = Install(ctx, root, *control, values...); err == nil {
		code = m.Run()
	}
	return code, errors.Join(err, (*control).Stop(), goleak.Find())
}

// Eventually waits until check returns no error, and fails the test with the message where it does not within some time.
func Eventually(t *testing.T, within time.Duration, check func() error, message string, args ...any) {
	t.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			require.Fail(t, fmt.Sprintf(message, args...), "%v", err)
		}
		<-tick.C
	}
}
