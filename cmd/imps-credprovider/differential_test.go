package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
)

// generator makes keys and images that are close to one another.
type generator struct{ *rand.Rand }

func (g generator) one(of ...string) string { return of[g.IntN(len(of))] }

// host is a host with a port, perhaps; of a key it may have globs.
func (g generator) host(glob bool) string {
	if g.IntN(6) == 0 {
		return g.one("docker.io", "index.docker.io", "localhost", "localhost:5000", "[fd00::1]:5000", "quay.io")
	}
	var labels []string
	for range 1 + g.IntN(3) {
		label := g.one("a", "b", "ab", "A", "a-b", "r1")
		if glob && g.IntN(3) == 0 {
			label = g.one("*", "a*", "*b", "r*")
		}
		labels = append(labels, label)
	}
	return strings.Join(labels, ".") + g.one("", "", ":5000", ":443")
}

func (g generator) key() string {
	return g.one("", "", "", "https://", "http://") + g.host(true) + g.one("", "", "", "/v1", "/v2") + g.one("", "", "/a", "/a/b", "/library", "/app", "/ap", "/a/", "/*", "/%2f", "/%61", "/a?b", "/a#b")
}

func (g generator) image() string {
	return g.host(false) + g.one("/a", "/a/b", "/ab", "/a/b/c", "/library/nginx", "/app", "/apple/b", "/x")
}

// A kubelet tries the same credentials, in the same order, with what the provider answers as with all that there are: by its own
// keyring and its own strict codec (test/cluster/modules/kubernetes/keyring).
func TestAKubeletTriesWhatItWouldWithAllCredentials(t *testing.T) {
	t.Parallel()
	const sets, images = 1000, 100
	binary := filepath.Join(t.TempDir(), "keyring")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-C", "../../test/cluster/modules/kubernetes", "-buildvcs=false", "-o", binary, "./keyring").CombinedOutput()
	require.NoError(t, err, "%s", out)
	judge := exec.CommandContext(t.Context(), binary)
	in, err := judge.StdinPipe()
	require.NoError(t, err)
	var verdict bytes.Buffer
	judge.Stdout = &verdict
	require.NoError(t, judge.Start())

	g := generator{rand.New(rand.NewPCG(1, 2))}
	dir := filepath.Join(t.TempDir(), "imps")
	w, err := nodecache.Open(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, w.Close()) }()
	cases, hits := bufio.NewWriter(in), 0
	for range sets {
		keys := map[string]bool{}
		for range 1 + g.IntN(24) {
			keys[g.key()] = true
		}
		var entries []nodecache.Entry
		c := map[string]any{}
		var names []string
		for key := range keys {
			// As the agent brings them.
			key, err := dockerconfig.Normalize(key)
			require.NoError(t, err)
			names = append(names, key)
			entries = append(entries, nodecache.Entry{Key: key, Username: password(key), Password: password("p")})
		}
		set(t, w, nodecache.Node, entries)
		c["keys"] = names
		for range images {
			image := g.image()
			code, answer, stderr := ask(t, asks(image, ""), "--cache-dir="+dir)
			require.Zero(t, code, stderr)
			if strings.Contains(answer, `"Registry"`) {
				hits++
			}
			c["image"], c["answer"] = image, json.RawMessage(answer)
			line, err := json.Marshal(c)
			require.NoError(t, err)
			_, err = cases.Write(append(line, '\n'))
			require.NoError(t, err)
		}
	}
	require.NoError(t, cases.Flush())
	require.NoError(t, in.Close())
	require.NoError(t, judge.Wait(), verdict.String())
	require.Equal(t, fmt.Sprintln(sets*images), verdict.String())
	require.Greater(t, hits, sets*images/20, "there is something to compare")
}
