// Package faults has imps-node crash, hang, come back too late, lose its token or its
// Node, and live by a wrong clock: as processes on a real API server, with the chart's
// identities. After each fault everything has to be as if it had never been.
package faults

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

var (
	// control is the control plane of all tests. They do not run in parallel, since they
	// share the one Lease.
	control *cluster.Cluster
	// binary is the built imps-node, with the race detector.
	binary string
	// root is the folder of the repository.
	root = filepath.Join("..", "..")
)

func TestMain(m *testing.M) {
	os.Exit(imps.RunTests(m, root, &control, func(ctx context.Context, dir string) (err error) {
		binary, err = imps.Build(ctx, root, dir, "-race")
		return err
	}))
}
