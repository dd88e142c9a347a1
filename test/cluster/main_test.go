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

	"github.com/imps-node/imps/test/cluster/cluster"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

func TestCommands(t *testing.T) {
	t.Run("build prints the programs", func(t *testing.T) {
		var stdout bytes.Buffer
		require.Zero(t, run(t.Context(), []string{"build"}, &stdout, os.Stderr))
		paths := strings.Fields(stdout.String())
		if canRunNodes() {
			require.Len(t, paths, 6)
		} else {
			require.Len(t, paths, 3)
		}
		for _, path := range paths {
			require.FileExists(t, path)
		}
	})

	up := func(t *testing.T, args ...string) (printed string) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var kubeconfig string
		stdout := writer(func(text []byte) {
			printed = string(text)
			kubeconfig = regexp.MustCompile(`KUBECONFIG=(\S+)`).FindStringSubmatch(printed)[1]
			require.FileExists(t, kubeconfig)
			cancel()
		})
		require.Zero(t, run(ctx, append([]string{"up"}, args...), stdout, os.Stderr))
		require.NotEmpty(t, kubeconfig)
		require.NoFileExists(t, kubeconfig)
		return printed
	}

	t.Run("up prints a kubeconfig and removes it in the end", func(t *testing.T) {
		require.NotContains(t, up(t), nodeName)
	})

	t.Run("up can start a node", func(t *testing.T) {
		cluster.NeedNode(t)
		require.Contains(t, up(t, "--node"), "nodeName: node-1")
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
