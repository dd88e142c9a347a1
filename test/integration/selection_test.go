package integration

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSmoke(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a")
	labelled := s.namespace(map[string]string{s.prefix: "yes"}, nil)
	unlabelled := s.namespace(nil, nil)
	s.resource(s.prefix, `
target:
  secret: {name: imps-pull-secret}
  namespaces:
    labels: [{matchLabels: {`+s.prefix+`: "yes"}}]
  namespacesWithPods:
    labels: [{matchLabels: {needs: `+s.prefix+`}}]
registry:
  credentials:
  - {name: hub, namespace: registry-access}
`)
	secret := s.has(labelled, "registry.one")
	require.NotEmpty(t, secret.UID)
	s.ready(s.prefix, 1)
	p := s.pod(unlabelled, "node-a", map[string]string{"needs": s.prefix}, nil)
	s.has(unlabelled, "registry.one")
	s.ready(s.prefix, 2)
	s.deletePod(p)
	s.lacks(unlabelled)
	s.source("hub", dockerConfig("registry.one", "registry.two"))
	rotated := s.has(labelled, "registry.one", "registry.two")
	require.Equal(t, secret.UID, rotated.UID)
}
