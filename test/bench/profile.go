package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/imps-node/imps/test/imps"
)

// build builds imps-node as `make build` does. With profiles, one file is laid over its
// source: what ships cannot be profiled.
func build(ctx context.Context, root, dir string, profiled bool) (string, error) {
	binary := filepath.Join(dir, "imps-node")
	var args []string
	if profiled {
		overlay := filepath.Join(dir, "overlay.json")
		raw, err := json.Marshal(map[string]map[string]string{"Replace": {
			filepath.Join(root, "cmd/imps-node/profile.go"): filepath.Join(root, "test/bench/testdata/profile.go"),
		}})
		if err != nil {
			return "", fmt.Errorf("encode the overlay: %w", err)
		}
		if err := os.WriteFile(overlay, raw, 0o600); err != nil {
			return "", fmt.Errorf("write the overlay: %w", err)
		}
		args = append(args, "-overlay", overlay)
	}
	return binary, compile(ctx, root, "./cmd/imps-node", binary, args...)
}

// compile builds a package of the module in a folder with the flags of `make build`, and more.
func compile(ctx context.Context, folder, pkg, binary string, more ...string) error {
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version=bench", "-o", binary}, more...)
	command := exec.CommandContext(ctx, "go", append(args, pkg)...) //nolint:gosec // the go tool
	command.Dir = folder
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", filepath.Base(binary), err, out)
	}
	return nil
}

// repository returns the folder of the source.
func repository(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/imps-node/imps").Output()
	if err != nil {
		return "", fmt.Errorf("find the repository (run this inside of it): %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// profiled runs f, with profiles of every process where they were asked for.
func (b *bench) profiled(ctx context.Context, phase string, f func() error) error {
	if b.settings.profile == "" {
		return f()
	}
	for _, p := range b.processes {
		if err := p.Signal(syscall.SIGUSR1); err != nil {
			return fmt.Errorf("profile %s: %w", p.Name, err)
		}
	}
	if err := f(); err != nil {
		return err
	}
	for _, p := range b.processes {
		if err := p.Signal(syscall.SIGUSR2); err != nil {
			return fmt.Errorf("profile %s: %w", p.Name, err)
		}
		for _, kind := range []string{"cpu", "heap"} {
			written := b.profilePath(p) + "." + kind
			name := strings.Join([]string{b.size.name, phase, p.Name, kind, "pprof"}, ".")
			if err := await(ctx, func(context.Context) error {
				return os.Rename(written, filepath.Join(b.settings.profile, name))
			}); err != nil {
				return fmt.Errorf("profile %s: %w", p.Name, err)
			}
		}
	}
	return nil
}

// profilePath is where a process writes its profiles, without the ending.
func (b *bench) profilePath(p *imps.Process) string {
	return filepath.Join(b.settings.profile, "writing."+p.Name)
}
