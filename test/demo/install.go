package main

import (
	"context"
	"time"

	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

// Names that the chart gives, or that it lets be used.
const (
	systemNamespace   = imps.SystemNamespace
	renderedNamespace = imps.RenderedNamespace
	sourceNamespace   = imps.SourceNamespace
	secretName        = imps.SecretName
)

// install builds the binary and applies the chart. The workloads in it stay objects, since there is
// no kubelet: the demo runs the same binary with the same arguments itself.
func (d *demo) install(ctx context.Context) error {
	d.note("cmd/imps-node, a registry for the end, and helm; the first run compiles what both need (some minutes)")
	begin := time.Now()
	root, err := imps.Root(ctx)
	if err != nil {
		return err
	}
	if d.binary, err = imps.Build(ctx, root, d.dir, "-trimpath"); err != nil {
		return err
	}
	if d.distribution, err = registry.Build(ctx, root, d.dir); err != nil {
		return err
	}
	d.note("cmd/imps-node and a registry are built after %.1f s", time.Since(begin).Seconds())

	begin = time.Now()
	if err := imps.Install(ctx, root, d.control, "nodeCache.enabled=true"); err != nil {
		return err
	}
	d.note("deploy/daemonset is rendered and applied after %.1f s: CRD, namespaces, identities, rights", time.Since(begin).Seconds())
	return nil
}
