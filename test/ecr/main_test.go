// Package ecr has imps-node serve ECR registries: as processes on a real API server, with the chart's identities, an AWS
// that verifies signatures, and a registry that lets in whoever has a token of it.
package ecr

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

var (
	// control is the control plane of all tests. They do not run in parallel, since they share the one Lease.
	control *cluster.Cluster
	// binary is the built imps-node, with the race detector, distribution the built registry.
	binary, distribution string
	// root is the folder of the repository.
	root = filepath.Join("..", "..")
)

func TestMain(m *testing.M) {
	os.Exit(imps.RunTests(m, root, &control, func(ctx context.Context, dir string) (err error) {
		if binary, err = imps.Build(ctx, root, dir, "-race"); err == nil {
			distribution, err = registry.Build(ctx, root, dir)
		}
		return err
	}))
}
