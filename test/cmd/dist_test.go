package cmd_test

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// What ships is static and stripped, and whoever builds it from the same source gets the same bytes, in whatever folder.
func TestTheProgramsThatShip(t *testing.T) {
	t.Parallel()
	root := filepath.Join("..", "..")
	dist := func() string {
		dir := t.TempDir()
		for _, folder := range []string{"cmd", "pkg"} {
			require.NoError(t, os.CopyFS(filepath.Join(dir, folder), os.DirFS(filepath.Join(root, folder))))
		}
		for _, file := range []string{"Makefile", "go.mod", "go.sum"} {
			raw, err := os.ReadFile(filepath.Join(root, file))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, file), raw, 0o600))
		}
		out, err := exec.CommandContext(t.Context(), "make", "-C", dir, "dist", "VERSION=v1.2.3").CombinedOutput()
		require.NoError(t, err, "%s", out)
		return filepath.Join(dir, "dist")
	}
	one, other := dist(), dist()
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		for _, name := range []string{"imps-node", "imps-credprovider"} {
			path := filepath.Join("linux-"+arch, name)
			program, err := os.ReadFile(filepath.Join(one, path))
			require.NoError(t, err)
			again, err := os.ReadFile(filepath.Join(other, path))
			require.NoError(t, err)
			require.True(t, string(program) == string(again), "%s differs", path)
			if name == "imps-credprovider" {
				require.Less(t, len(program), 3<<20, "it starts for every pull")
			}
			f, err := elf.Open(filepath.Join(one, path))
			require.NoError(t, err)
			defer func() { _ = f.Close() }()
			require.Equal(t, machine, f.Machine)
			require.Nil(t, f.Section(".symtab"), "%s is not stripped", path)
			for _, segment := range f.Progs {
				require.NotContains(t, []elf.ProgType{elf.PT_INTERP, elf.PT_DYNAMIC}, segment.Type, "%s is not static", path)
			}
		}
	}
}
