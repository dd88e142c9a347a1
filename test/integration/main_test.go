// Package integration tests both duties on a real API server, with the identities that
// the chart gives them.
package integration

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"k8s.io/klog/v2"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	systemNamespace   = "imps-system"
	renderedNamespace = "imps-rendered"
	sourceNamespace   = "registry-access"
	secretName        = "imps-pull-secret"
	otherSecretName   = "imps-pull-secret-b"
)

// control is the control plane that all tests of this package share.
var control *cluster.Cluster

// logs is everything that imps and client-go logged, at the highest verbosity.
var logs logBuffer

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if os.Getenv("IMPS_TEST_LOGS") != "" {
		_, _ = os.Stderr.Write(p)
	}
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(&logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	// As imps-node does at --log-level=debug.
	klog.SetSlogLogger(logger())
	var verbosity klog.Level
	if err := verbosity.Set("4"); err != nil {
		return 1, err
	}
	ctx := context.Background()
	if control, err = cluster.Run(ctx); err != nil {
		return 1, err
	}
	stopped := false
	defer func() {
		if !stopped {
			_ = control.Stop()
		}
	}()
	if err := install(ctx, control); err != nil {
		return 1, err
	}
	if code = m.Run(); code != 0 {
		return code, nil
	}
	if err := findCanary("the logs", logs.String()); err != nil {
		return 1, err
	}
	stopped = true
	if err := control.Stop(); err != nil {
		return 1, err
	}
	if err := goleak.Find(); err != nil {
		return 1, err
	}
	return code, nil
}

// install applies what the chart renders: CRD, namespaces, identities and their rights.
// The workloads stay objects, since no kubelet runs them: tests run the duties themselves.
func install(ctx context.Context, c *cluster.Cluster) error {
	return imps.Install(ctx, filepath.Join("..", ".."), c, "targetSecretNames={"+secretName+","+otherSecretName+"}", "allowRescue=true")
}
