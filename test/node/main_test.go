// Package node has kubelets pull through imps-credprovider: real ones, on a node with containerd, from registries that let in
// whoever has a good password, or a good token of an AWS. imps runs as processes, with the chart's arguments and identities.
package node

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
	// binary is the built imps-node, with the race detector, provider the built imps-credprovider, distribution the registry.
	binary, provider, distribution string
	// root is the folder of the repository.
	root = filepath.Join("..", "..")
)

func TestMain(m *testing.M) {
	prepare := func(ctx context.Context, dir string) (err error) {
		if binary, err = imps.Build(ctx, root, dir, "-race"); err != nil {
			return err
		}
		if provider, err = imps.BuildCommand(ctx, root, dir, "imps-credprovider"); err != nil {
			return err
		}
		distribution, err = registry.Build(ctx, root, dir)
		return err
	}
	os.Exit(imps.RunTests(m, root, &control, prepare, "nodeCache.enabled=true"))
}
