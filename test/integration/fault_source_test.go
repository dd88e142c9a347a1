package integration

import (
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// The right to read the sources is taken away while imps runs, and given back. A watch that
// is open goes on, so what tells is the next one.
func TestASourceThatMayNotBeReadKeepsItsLastGoodCredentials(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	was := s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)

	bindings := s.core.RbacV1().RoleBindings(sourceNamespace)
	binding, err := bindings.Get(t.Context(), "imps-coordinator-source", metav1.GetOptions{})
	require.NoError(t, err)
	require.NoError(t, bindings.Delete(t.Context(), binding.Name, metav1.DeleteOptions{}))
	giveBack := s.givesBack(func() error {
		binding.ResourceVersion, binding.UID = "", ""
		_, err := bindings.Create(ctxOf(t), binding, metav1.CreateOptions{FieldManager: "helm"})
		return err
	})
	mark := s.control.Audit().Mark()
	s.proxy.BreakAll()
	s.failed(s.prefix, "registry-access.hub", "forbidden", "last good credentials stay in use")
	s.source("hub", dockerConfig("registry.two"))
	late := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.has(late, "registry.one")
	require.Equal(t, was.ResourceVersion, s.secret(namespace, secretName).ResourceVersion)

	giveBack()
	for _, namespace := range []string{namespace, late} {
		s.has(namespace, "registry.two")
	}
	s.ready(s.prefix, 2)
	require.Equal(t, was.UID, s.secret(namespace, secretName).UID)
	s.calm()
	require.Len(t, s.secretWrites(mark, "coordinator"), 3)
}

// givesBack returns what gives a right back, at the latest when the test ends: those after
// it need it.
func (s *system) givesBack(give func() error) func() {
	once := sync.OnceFunc(func() { require.NoError(s.t, give()) })
	s.t.Cleanup(once)
	return once
}

// The rights of the coordinator are taken away and given back: that is no change that it
// hears of, and nothing has to change for it to go on.
func TestRightsThatAreTakenAwayForAWhileCostNothingButTime(t *testing.T) {
	s := newSystemBehindProxy(t)
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	history := s.observe()
	namespace := s.namespace(map[string]string{s.prefix: "a"}, nil)
	s.resource(s.prefix, spec(`  namespaces: {labels: [{matchLabels: {`+s.prefix+`: a}}]}`))
	s.has(namespace, "registry.one")
	s.ready(s.prefix, 1)

	bindings := s.core.RbacV1().ClusterRoleBindings()
	binding, err := bindings.Get(t.Context(), "imps-coordinator", metav1.GetOptions{})
	require.NoError(t, err)
	require.NoError(t, bindings.Delete(t.Context(), binding.Name, metav1.DeleteOptions{}))
	giveBack := s.givesBack(func() error {
		binding.ResourceVersion, binding.UID = "", ""
		_, err := bindings.Create(ctxOf(t), binding, metav1.CreateOptions{FieldManager: "helm"})
		return err
	})
	mark := s.control.Audit().Mark()
	s.source("hub", dockerConfig("registry.two"))
	s.eventually(func() error {
		refused := map[string]bool{}
		for _, e := range s.requests(mark, "coordinator") {
			if e.Code == http.StatusForbidden {
				refused[e.Verb+" "+e.Resource] = true
			}
		}
		if !refused["patch secrets"] || !refused["patch imagepullsecrets"] {
			return fmt.Errorf("refused: %v", refused)
		}
		return nil
	}, "the coordinator is not refused")
	giveBack()
	s.has(namespace, "registry.two")
	s.ready(s.prefix, 1)
	history.is(s, []string{namespace}, watch.Added, watch.Modified)
	s.calm()
}

// Credentials that no Secret can hold are found to be so before anything is sent.
func TestTooManyRegistriesAreRefusedBeforeAnythingIsWritten(t *testing.T) {
	s := newSystem(t)
	s.source("one", dockerConfig("registry.one"))
	s.source("two", dockerConfig("registry.two"))
	s.coordinator()
	namespace := s.namespace(nil, nil)
	s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, namespaces: {names: [`+namespace+`]}}
registry:
  credentials: [{name: one, namespace: registry-access}, {name: two, namespace: registry-access}]`)
	was := s.has(namespace, "registry.one", "registry.two")
	s.ready(s.prefix, 1)

	// Either source is fine by itself.
	many := func(name string) []byte {
		var registries []string
		for i := range 3500 {
			registries = append(registries, fmt.Sprintf("%s-%d.registry.example", name, i))
		}
		return dockerConfig(registries...)
	}
	mark := s.control.Audit().Mark()
	s.source("one", many("one"))
	s.becomesLarger(namespace, was.ResourceVersion)
	s.ready(s.prefix, 1)
	was = s.secret(namespace, secretName)
	require.Len(t, s.secretWrites(mark, "coordinator"), 1)
	mark = s.control.Audit().Mark()
	s.source("two", many("two"))
	s.failed(s.prefix, "too large", "list fewer registries", "what was delivered before stays as it is")
	for _, e := range s.requests(mark, "coordinator") {
		require.False(t, e.Resource == "secrets" && !slices.Contains([]string{"get", "list", "watch"}, e.Verb), "%s %s", e.Verb, e.URI)
	}
	require.Equal(t, was.ResourceVersion, s.secret(namespace, secretName).ResourceVersion)

	s.source("one", dockerConfig("registry.one"))
	s.source("two", dockerConfig("registry.three"))
	require.Equal(t, was.UID, s.has(namespace, "registry.one", "registry.three").UID)
	s.ready(s.prefix, 1)
	s.calm()
}

// becomesLarger waits until the Secret of a namespace was changed.
func (s *system) becomesLarger(namespace, resourceVersion string) {
	s.t.Helper()
	s.eventually(func() error {
		if s.secret(namespace, secretName).ResourceVersion == resourceVersion {
			return fmt.Errorf("it is as it was")
		}
		return nil
	}, "the Secret does not change")
}
