package integration

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// A server that cannot stream a list (watch-list) is listed and watched instead.
func TestAServerWithoutWatchListIsServedToo(t *testing.T) {
	old := cluster.Start(t, cluster.WithoutWatchList())
	require.NoError(t, install(t.Context(), old))
	s := newSystemOn(t, old)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	labelled, byPods := s.namespace(map[string]string{s.prefix: "a"}, nil), s.namespace(nil, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`+"\n"+podRules(s.prefix)))
	s.has(labelled, "registry.one")
	pod := s.pod(byPods, "node-a", map[string]string{s.prefix: "a"}, nil)
	was := s.has(byPods, "registry.one")
	s.source("hub", dockerConfig("registry.two"))
	require.Equal(t, was.UID, s.has(byPods, "registry.two").UID)
	s.ready(s.prefix, 2)
	s.deletePod(pod)
	s.lacks(byPods)
}
