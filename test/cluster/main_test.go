package main

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

func TestCommands(t *testing.T) {
	t.Run("build prints the programs", func(t *testing.T) {
		var stdout bytes.Buffer
		require.Zero(t, run(t.Context(), []string{"build"}, &stdout, os.Stderr))
		paths := strings.Fields(stdout.String())
		require.Len(t, paths, 3)
		for _, path := range paths {
			require.FileExists(t, path)
		}
	})

	t.Run("up prints a kubeconfig and removes it in the end", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var kubeconfig string
		stdout := writer(func(text []byte) {
			kubeconfig = string(regexp.MustCompile(`KUBECONFIG=(\S+)`).FindSubmatch(text)[1])
			require.FileExists(t, kubeconfig)
			cancel()
		})
		require.Zero(t, run(ctx, []string{"up"}, stdout, os.Stderr))
		require.NotEmpty(t, kubeconfig)
		require.NoFileExists(t, kubeconfig)
	})

	t.Run("an unknown command fails", func(t *testing.T) {
		var stderr bytes.Buffer
		require.Equal(t, 1, run(t.Context(), []string{"down"}, os.Stdout, &stderr))
		require.Contains(t, stderr.String(), "unknown command")
	})
}

// writer hands each write to a function.
type writer func([]byte)

func (w writer) Write(text []byte) (int, error) {
	w(text)
	return len(text), nil
}
