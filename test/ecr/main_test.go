// Package ecr has imps-node serve ECR registries: as processes on a real API server, with the chart's identities, an AWS
// that verifies signatures, and a registry that lets in whoever has a token of it.
package ecr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

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
	code, err := run(context.Background(), m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(ctx context.Context, m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "imps-ecr-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if binary, err = imps.Build(ctx, root, dir, "-race"); err != nil {
		return 1, err
	}
	if distribution, err = registry.Build(ctx, root, dir); err != nil {
		return 1, err
	}
	if control, err = cluster.Run(ctx); err != nil {
		return 1, err
	}
	if err = imps.Install(ctx, root, control); err == nil {
		code = m.Run()
	}
	return code, errors.Join(err, control.Stop(), goleak.Find())
}
