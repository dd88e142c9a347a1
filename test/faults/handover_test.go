package faults

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Two resources claim many Secrets, and the older one goes: the garbage collector, which
// works on the same Secrets at that moment, takes none.
func TestAllOfManySharedSecretsAreHandedOver(t *testing.T) {
	const shared = 400
	s := newSystem(t)
	s.source("old", "registry.old")
	s.source("young", "registry.young")
	s.leader("a")
	all := want{namespaces: s.namespaces(shared, "a"), registry: "registry.old"}
	// Two that are made in one second are ordered by their names.
	older := s.resource("a", "old", s.byLabel("a"))
	younger := s.resource("b", "young", s.byLabel("a"))
	s.eventually(func() error {
		for _, secret := range s.secrets() {
			if secret.Namespace != s.foreign.Namespace && len(secret.OwnerReferences) != 2 {
				return fmt.Errorf("the Secret in %s has %d owners", secret.Namespace, len(secret.OwnerReferences))
			}
			s.kept[secret.Namespace] = secret.UID
		}
		if len(s.kept) != shared+1 {
			return fmt.Errorf("%d Secrets", len(s.kept))
		}
		return nil
	}, "not every Secret comes to have both owners")
	s.pass(quiet)

	mark := control.Audit().Mark()
	s.deleteResource(older, metav1.DeletePropagationBackground)
	all.resource, all.registry = younger, "registry.young"
	s.settles(all)
	writes := s.writes(mark)
	for _, namespace := range all.namespaces {
		require.Equal(t, 1, writes[target(namespace)])
		delete(writes, target(namespace))
	}
	rendered, state := own(older)
	require.Subset(t, []string{rendered, state}, slices.Collect(maps.Keys(writes)), "and the end of the older one's own")
}
