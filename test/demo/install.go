package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Names that the chart gives, or that it lets be used.
const (
	systemNamespace   = "imps-system"
	renderedNamespace = "imps-rendered"
	sourceNamespace   = "registry-access"
	secretName        = "imps-pull-secret"
	coordinatorName   = "imps-coordinator"
	agentName         = "imps-node"
)

// install builds the binary and applies the chart. The workloads in it stay objects, since there is
// no kubelet: the demo runs the same binary with the same arguments itself.
func (d *demo) install(ctx context.Context) error {
	d.note("cmd/imps-node and helm; the first run compiles what both need (some minutes)")
	begin := time.Now()
	root, err := d.output(ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", "github.com/imps-node/imps")
	if err != nil {
		return err
	}
	d.binary = filepath.Join(d.dir, "imps-node")
	if _, err := d.output(ctx, root, "go", "build", "-trimpath", "-buildvcs=false", "-o", d.binary, "./cmd/imps-node"); err != nil {
		return err
	}
	d.note("cmd/imps-node is built after %.1f s", time.Since(begin).Seconds())

	begin = time.Now()
	helm, err := d.output(ctx, root, filepath.Join(root, "hack", "tool"), "helm")
	if err != nil {
		return err
	}
	manifests, err := d.output(ctx, root, helm, "template", "imps-node", "deploy/daemonset", "--include-crds",
		"--namespace", systemNamespace, "--set", "createNamespaces.release=true,createNamespaces.sources=true")
	if err != nil {
		return err
	}
	if err := d.control.Apply(ctx, []byte(manifests)); err != nil {
		return err
	}
	d.note("deploy/daemonset is rendered and applied after %.1f s: CRD, namespaces, identities, rights", time.Since(begin).Seconds())
	return nil
}

// output runs a program in a folder and returns what it prints; what it says besides, the audience
// sees.
func (d *demo) output(ctx context.Context, folder, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the go tool, and programs of this repository
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = d.out
	cmd.WaitDelay = 5 * time.Second // what it started itself may hold its output open
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", filepath.Base(program), args[0], err)
	}
	return strings.TrimSpace(string(out)), nil
}
