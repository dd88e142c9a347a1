package cluster

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// Targets of resources. Those of the same kind select the same.
const (
	byName = `{secret: {name: pull, labels: {l: "1"}}, namespaces: {names: ["n", kube-n]}}`
	byPods = `{secret: {name: pull, labels: {l: "1"}}, namespacesWithPods: {labels: [{}]}}`
	byNone = `{secret: {name: pull, labels: {l: "1"}}}`

	toKubelets   = `{secret: {name: pull}, kubelet: {}}`
	byOtherLabel = `{secret: {name: pull, labels: {l: "1"}}, namespaces: {labels: [{matchLabels: {other: x}}]}}`
)

// situation is what a term knows about the Secret "pull" in one namespace.
type situation struct {
	*term
	t *testing.T
	// key is the Secret's; its namespace is n.
	key targetKey
	// now is when the decision is made.
	now time.Time
}

func newSituation(t *testing.T) *situation {
	t.Helper()
	s := &situation{term: newTestTerm(t), t: t, key: targetKey{"n", "pull"}, now: time.Now()}
	s.namespace("n", nil)
	s.mirrorOf(t, "pull")
	return s
}

// there puts a Secret there, as it is after an apply of the target of a claim.
func (s *situation) there(c *claim, edit ...func(*metav1.PartialObjectMetadata)) *metav1.PartialObjectMetadata {
	s.t.Helper()
	m := applied(s.t, "n", c.rendered.Target)
	for _, e := range edit {
		e(m)
	}
	s.mirrorOf(s.t, "pull", m)
	return m
}

// refersTo changes the owner references of the Secret.
func (s *situation) refersTo(owners ...types.UID) {
	key := types.NamespacedName{Namespace: s.key.namespace, Name: s.key.name}
	secret, _ := s.targets[s.key.name].Get(key)
	secret.OwnerReferences, secret.ResourceVersion = owners, "999999"
	s.targets[s.key.name].Put(key, secret)
}

func (s *situation) decides() decision { return s.decide(s.key, s.now) }

// outcomes are those of all claims, as text.
func (s *situation) outcomes() map[string]string {
	kinds := [...]string{"pending", "delivered", "excluded", "conflicted", "foreign", "failed"}
	all := map[string]string{}
	for _, c := range s.claims {
		for namespace, o := range c.outcomes {
			all[c.ref.Name+" in "+namespace] = fmt.Sprintf("%s at %d", kinds[o.kind], o.counter)
		}
	}
	for key, u := range s.undeletable {
		all[string(u.owner)+" of "+key.String()] = "undeletable"
	}
	return all
}

// inBubble runs a test in a synctest bubble.
func inBubble(t *testing.T, test func(t *testing.T, s *situation)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { test(t, newSituation(t)) })
}

// Edits of the metadata of a Secret that is there.
func unmanaged(m *metav1.PartialObjectMetadata) { m.ManagedFields = nil }
func orphaned(m *metav1.PartialObjectMetadata)  { m.OwnerReferences = nil }
func deleting(m *metav1.PartialObjectMetadata) {
	now := metav1.Now()
	m.DeletionTimestamp, m.Finalizers = &now, []string{"x/y"}
}

func users(m *metav1.PartialObjectMetadata) {
	m.ObjectMeta = metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: map[string]string{"users": "x"}}
}

func imps(m *metav1.PartialObjectMetadata) {
	m.ManagedFields = nil
	m.Annotations = map[string]string{impsync.AnnotationLegacyApplied: canary}
}

func at(counter string) func(m *metav1.PartialObjectMetadata) {
	return func(m *metav1.PartialObjectMetadata) {
		m.Annotations[impsync.AnnotationRevision] = m.Labels[impsync.LabelOwnerUID] + "." + counter
	}
}

func edited(m *metav1.PartialObjectMetadata) {
	m.ManagedFields[0].Manager = "x"
	m.ManagedFields = append(m.ManagedFields, metav1.ManagedFieldsEntry{
		Manager: impsync.FieldManager, Operation: metav1.ManagedFieldsOperationApply, APIVersion: "v1", FieldsType: "FieldsV1",
		FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:annotations":{"f:` + impsync.AnnotationRevision + `":{}}}}`),
	})
}

func TestDecideAboutASelectedNamespace(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		// there is the Secret that is there, as an edit of one that was just delivered.
		there   []func(*metav1.PartialObjectMetadata)
		absent  bool
		verb    verb
		outcome string
	}{
		"nothing is there: create":                   {absent: true, verb: create, outcome: "pending at 0"},
		"it is as it should be: leave":               {verb: leave, outcome: "delivered at 7"},
		"an older content: update":                   {there: []func(*metav1.PartialObjectMetadata){at("6")}, verb: update, outcome: "pending at 0"},
		"somebody has edited it: update":             {there: []func(*metav1.PartialObjectMetadata){edited}, verb: update, outcome: "pending at 0"},
		"its owner reference is gone: update":        {there: []func(*metav1.PartialObjectMetadata){orphaned}, verb: update, outcome: "pending at 0"},
		"of a resource that is dead: update":         {there: []func(*metav1.PartialObjectMetadata){func(m *metav1.PartialObjectMetadata) { m.Labels[impsync.LabelOwnerUID] = "dead" }}, verb: update, outcome: "pending at 0"},
		"written by IMPS: adopt":                     {there: []func(*metav1.PartialObjectMetadata){imps}, verb: adopt, outcome: "pending at 0"},
		"written by IMPS and orphaned: adopt":        {there: []func(*metav1.PartialObjectMetadata){imps, orphaned}, verb: adopt, outcome: "pending at 0"},
		"restored from a backup: adopt":              {there: []func(*metav1.PartialObjectMetadata){unmanaged}, verb: adopt, outcome: "pending at 0"},
		"restored, an older content: adopt":          {there: []func(*metav1.PartialObjectMetadata){unmanaged, at("6")}, verb: adopt, outcome: "pending at 0"},
		"a user's: leave it alone":                   {there: []func(*metav1.PartialObjectMetadata){users}, verb: leave, outcome: "foreign at 0"},
		"a user's that is being deleted: leave":      {there: []func(*metav1.PartialObjectMetadata){users, deleting}, verb: leave, outcome: "failed at 0"},
		"a finalizer holds ours: wait for its end":   {there: []func(*metav1.PartialObjectMetadata){deleting}, verb: leave, outcome: "failed at 0"},
		"a finalizer holds an older one: wait, too":  {there: []func(*metav1.PartialObjectMetadata){at("6"), deleting}, verb: leave, outcome: "failed at 0"},
		"our label without anything else: a user's":  {there: []func(*metav1.PartialObjectMetadata){unmanaged, func(m *metav1.PartialObjectMetadata) { m.Annotations = nil }}, verb: leave, outcome: "foreign at 0"},
		"with labels of others: leave, all is there": {there: []func(*metav1.PartialObjectMetadata){func(m *metav1.PartialObjectMetadata) { m.Labels["users"] = "x" }}, verb: leave, outcome: "delivered at 7"},
	}
	for name, test := range tests {
		for kind, target := range map[string]string{"by name": byName, "by pods": byPods} {
			t.Run(name+", "+kind, func(t *testing.T) {
				inBubble(t, func(t *testing.T, s *situation) {
					c := s.claimOf(t, resource(t, "a", 0, target), 7)
					s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
					var m *metav1.PartialObjectMetadata
					if !test.absent {
						m = s.there(c, test.there...)
					}
					d := s.decides()
					require.Equal(t, test.verb, d.verb, d.verb)
					require.Equal(t, map[string]string{"a in n": test.outcome}, s.outcomes())
					if d.verb == leave {
						require.Zero(t, d)
						return
					}
					require.Same(t, c, d.winner)
					require.Equal(t, []impsync.ResourceRef{c.ref}, d.owners)
					require.Equal(t, uint64(7), d.target.Revision().Counter)
					require.False(t, d.byPods)
					if m != nil {
						require.Equal(t, impsync.ExistingOf(m), d.existing)
					}
					again := s.decides()
					require.Equal(t, d.verb, again.verb, "the same again")
					require.Equal(t, map[string]string{"a in n": test.outcome}, s.outcomes())
				})
			})
		}
	}
}

func TestDecideStopsWhereSomebodyHasCountedOn(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		for _, edits := range [][]func(*metav1.PartialObjectMetadata){{at("9")}, {at("9"), edited}} {
			c := s.claimOf(t, resource(t, "a", 0, byName), 7)
			s.there(c, edits...)
			require.Zero(t, s.decides(), "it is never overwritten")
			require.Equal(t, uint64(9), c.minCounter, "the next counter is higher")
			require.Equal(t, []string{"uid-a"}, s.queuedResources(), "the resource is looked at again")
			require.Equal(t, map[string]string{"a in n": "pending at 0"}, s.outcomes())
			s.there(c, at("8"))
			require.Zero(t, s.decides())
			require.Equal(t, uint64(9), c.minCounter)
			s.queuedResources()
		}
	})
}

func TestDecideBelievesOnlyCountersOfImps(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		edits []func(*metav1.PartialObjectMetadata)
		want  verb
	}{
		"restored from a backup of later":         {[]func(*metav1.PartialObjectMetadata){at("9"), unmanaged}, adopt},
		"written by IMPS, with a revision":        {[]func(*metav1.PartialObjectMetadata){at("9"), func(m *metav1.PartialObjectMetadata) { m.Annotations[impsync.AnnotationLegacyApplied] = "" }}, adopt},
		"a number that nobody can have got to":    {[]func(*metav1.PartialObjectMetadata){at("9223372036854775807")}, update},
		"the first number that nobody can get to": {[]func(*metav1.PartialObjectMetadata){at("4611686018427387904")}, update},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byName), 7)
				s.there(c, test.edits...)
				require.Equal(t, test.want, s.decides().verb)
				require.Zero(t, c.minCounter)
				require.Zero(t, s.highestCounter("uid-a"))
			})
		})
	}
}

// A revision that somebody else has set says nothing: the content is put right.
func TestDecideDoesNotBelieveARevisionThatIsNotOurs(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(c, at("99"), func(m *metav1.PartialObjectMetadata) {
			m.ManagedFields[0].FieldsV1.SetRawString(`{"f:metadata":{"f:labels":{"f:l":{}}}}`)
		})
		require.Equal(t, update, s.decides().verb)
		require.Zero(t, c.minCounter)
	})
}

func TestDecideAboutANamespaceThatIsGoneOrGoing(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(s *situation){
		"it is gone": func(s *situation) {
			s.namespaces.Drop(types.NamespacedName{Name: "n"}, func(namespaceMeta) bool { return true })
		},
		"it is going": func(s *situation) {
			s.namespaces.Put(types.NamespacedName{Name: "n"}, namespaceMeta{terminating: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byName), 7)
				s.there(c)
				s.decides()
				require.NotEmpty(t, s.outcomes())
				edit(s)
				require.Zero(t, s.decides())
				require.Empty(t, s.outcomes(), "it counts no more")
			})
		})
	}
}

func TestDecideWaitsUntilTheSecretsOfTheNameAreKnown(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.targets["pull"] = impsync.NewMirror(impsync.MirrorConfig[impsync.Existing]{})
		require.Zero(t, s.decides())
		require.Zero(t, s.decide(targetKey{"n", "unknown"}, s.now))
		require.Empty(t, s.outcomes())
	})
}

func TestDecideLeavesExcludedNamespacesAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.namespace("kube-n", nil)
		key := targetKey{"kube-n", "pull"}
		require.Zero(t, s.decide(key, s.now))
		require.Equal(t, map[string]string{"a in kube-n": "excluded at 0"}, s.outcomes())

		// One that was delivered before the namespace was excluded goes.
		s.mirrorOf(t, "pull", applied(t, "kube-n", c.rendered.Target))
		d := s.decide(key, s.now)
		require.Equal(t, remove, d.verb)
		require.Same(t, c, d.winner)
		require.Equal(t, map[string]string{"a in kube-n": "excluded at 0"}, s.outcomes())

		foreign := applied(t, "kube-n", c.rendered.Target)
		users(foreign)
		s.mirrorOf(t, "pull", foreign)
		require.Zero(t, s.decide(key, s.now))
	})
}

func TestDecideAboutANamespaceThatNothingSelects(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		there  []func(*metav1.PartialObjectMetadata)
		absent bool
		verb   verb
	}{
		"nothing is there: leave":                            {absent: true, verb: leave},
		"ours: delete":                                       {verb: remove},
		"ours, edited: delete":                               {there: []func(*metav1.PartialObjectMetadata){edited}, verb: remove},
		"ours, an older content: delete":                     {there: []func(*metav1.PartialObjectMetadata){at("6")}, verb: remove},
		"ours, counted on by another leader: delete":         {there: []func(*metav1.PartialObjectMetadata){at("9")}, verb: remove},
		"written by IMPS: delete, as IMPS does":              {there: []func(*metav1.PartialObjectMetadata){imps}, verb: remove},
		"restored: a user's copy, leave":                     {there: []func(*metav1.PartialObjectMetadata){unmanaged}, verb: leave},
		"a user's: leave":                                    {there: []func(*metav1.PartialObjectMetadata){users}, verb: leave},
		"ours, going already: leave":                         {there: []func(*metav1.PartialObjectMetadata){deleting}, verb: leave},
		"of a resource that nobody knows: leave":             {there: []func(*metav1.PartialObjectMetadata){func(m *metav1.PartialObjectMetadata) { m.Labels[impsync.LabelOwnerUID] = "dead" }}, verb: leave},
		"of IMPS, of a resource that nobody knows: leave it": {there: []func(*metav1.PartialObjectMetadata){imps, func(m *metav1.PartialObjectMetadata) { m.Labels[impsync.LabelOwnerUID] = "dead" }}, verb: leave},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byNone), 7)
				var m *metav1.PartialObjectMetadata
				if !test.absent {
					m = s.there(c, test.there...)
				}
				d := s.decides()
				require.Equal(t, test.verb, d.verb, d.verb)
				require.Empty(t, s.outcomes())
				if d.verb == remove {
					require.Same(t, c, d.winner)
					require.Equal(t, impsync.ExistingOf(m), d.existing)
					require.Empty(t, d.owners)
					require.False(t, d.byPods, "a namespace rule is no matter of the nodes")
				}
			})
		})
	}
}

// What is in force may be older than what the resources say by now, and then nothing is
// deleted on its word.
func TestASecretThatNothingSelectsIsDeletedOnlyOnTheWordOfTheResourcesAsTheyAre(t *testing.T) {
	t.Parallel()
	changed := func(r *v1alpha1.ImagePullSecret) *v1alpha1.ImagePullSecret {
		r = r.DeepCopy()
		r.Generation++
		return r
	}
	for name, test := range map[string]struct {
		// known changes what the term knows beside the owner, and returns what is there.
		known func(s *situation, owner *v1alpha1.ImagePullSecret) (there []*v1alpha1.ImagePullSecret)
		asked []string
	}{
		"they say what is in force": {
			func(_ *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				return []*v1alpha1.ImagePullSecret{owner}
			},
			[]string{listOfResources, deletion},
		},
		"the owner says something else, which is not in force yet": {
			func(s *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				s.byUID[owner.UID] = changed(owner)
				return []*v1alpha1.ImagePullSecret{s.byUID[owner.UID]}
			},
			nil,
		},
		"the owner says something else, as nobody has told yet": {
			func(_ *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				return []*v1alpha1.ImagePullSecret{changed(owner)}
			},
			[]string{listOfResources},
		},
		"the owner is going, as nobody has told yet": {
			func(_ *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				going := owner.DeepCopy()
				now := metav1.Now()
				going.DeletionTimestamp = &now
				return []*v1alpha1.ImagePullSecret{going}
			},
			[]string{listOfResources},
		},
		"the owner is gone, as nobody has told yet": {
			func(*situation, *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				return []*v1alpha1.ImagePullSecret{}
			},
			[]string{listOfResources},
		},
		"another one of the name is new": {
			func(s *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				other := resource(s.t, "b", 1, byName)
				s.byUID[other.UID] = other
				return []*v1alpha1.ImagePullSecret{owner, other}
			},
			nil,
		},
		"another one is new, as nobody has told yet": {
			func(s *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				return []*v1alpha1.ImagePullSecret{owner, resource(s.t, "b", 1, byName)}
			},
			[]string{listOfResources},
		},
		"another one is new, of another target name": {
			func(s *situation, owner *v1alpha1.ImagePullSecret) []*v1alpha1.ImagePullSecret {
				other := resource(s.t, "b", 1, `{secret: {name: other}, namespaces: {names: [n]}}`)
				s.byUID[other.UID] = other
				return []*v1alpha1.ImagePullSecret{owner, other}
			},
			[]string{listOfResources, deletion},
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				owner := resource(t, "a", 0, byNone)
				s.there(s.claimOf(t, owner, 7))
				s.server().resources = test.known(s, owner)
				err := s.reconcileTarget(t.Context(), s.key)
				require.Equal(t, test.asked, s.server().asked())
				if slices.Contains(test.asked, deletion) {
					require.ErrorIs(t, err, syscall.ECONNREFUSED)
					return
				}
				require.Empty(t, s.undeletable)
				if test.asked != nil {
					require.ErrorIs(t, err, errBehind)
					return
				}
				require.NoError(t, err)
				require.Empty(t, s.queuedTargets())
				<-time.After(impsync.RecheckSoonest)
				synctest.Wait()
				require.Equal(t, []string{"n/pull"}, s.queuedTargets(), "it is looked at again")
			})
		})
	}
}

func TestDecideAboutSecretsOfAResourceThatAsksForNothingAnyMore(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(c)
		require.Zero(t, s.decides())
		require.NoError(t, s.withdraw(t.Context(), c, 1))
		require.Equal(t, []string{"n/pull"}, s.queuedTargets())
		require.Equal(t, remove, s.decides().verb)
		require.Empty(t, s.outcomes())
		require.Empty(t, s.server().asked())
	})
}

func TestDecideAboutSecretsOfADeletedResource(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		// state is the resource's: gone, orphaned, unknown or unrendered.
		state string
		there []func(*metav1.PartialObjectMetadata)
		verb  verb
	}{
		"it was deleted: its Secrets go":                         {"gone", nil, remove},
		"it was deleted; a Secret without owner reference stays": {"gone", []func(*metav1.PartialObjectMetadata){orphaned}, leave},
		"it was deleted, but its Secrets were to stay":           {"orphaned", nil, leave},
		"it may be too new to be known":                          {"unknown", nil, leave},
		"it was not rendered yet in this term: nothing is known": {"unrendered", nil, leave},
		"it was deleted; what was written by IMPS for it goes":   {"gone", []func(*metav1.PartialObjectMetadata){imps}, remove},
		"it was deleted; a copy that a user has restored stays":  {"gone", []func(*metav1.PartialObjectMetadata){unmanaged}, leave},
		"it was deleted; what goes already is not deleted again": {"gone", []func(*metav1.PartialObjectMetadata){deleting}, leave},
		"it was deleted, and handed over to nobody: the Secret goes": {"gone", []func(*metav1.PartialObjectMetadata){func(m *metav1.PartialObjectMetadata) {
			m.OwnerReferences = append(m.OwnerReferences, metav1.OwnerReference{UID: "uid-other"})
		}}, remove},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				r := resource(t, "a", 0, byName)
				c := s.claimOf(t, r, 7)
				s.there(c, test.there...)
				delete(s.claims, r.UID)
				delete(s.byTarget["pull"], r.UID)
				delete(s.byUID, r.UID)
				switch test.state {
				case "gone":
					s.gone[r.UID] = false
				case "orphaned":
					s.gone[r.UID] = true
				case "unrendered":
					s.byUID[r.UID] = r
					s.claims[r.UID] = newClaim(r, impsync.Rendered{})
				}
				d := s.decides()
				require.Equal(t, test.verb, d.verb, d.verb)
				require.Nil(t, d.winner)
				require.False(t, d.byPods)
				if test.state == "unknown" {
					require.Equal(t, []string{"uid-a"}, s.queuedResources(), "it is asked for")
				} else {
					require.Empty(t, s.queuedResources())
				}
			})
		})
	}
}

// The winner was deleted, and the loser ceased to select the namespace, before anybody led
// to hand the Secret over. The loser's owner reference holds it.
func TestDecideAboutASecretOfADeadResourceThatAnotherHasClaimed(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		change func(*situation, *claim)
		verb   verb
	}{
		"it goes": {func(*situation, *claim) {}, remove},
		"not while it is not known what the other wants": {func(_ *situation, other *claim) {
			other.rendered, other.unread = impsync.Rendered{}, true
		}, leave},
		"the other asks for nothing any more": {func(_ *situation, other *claim) {
			other.rendered, other.withdrawn = impsync.Rendered{}, true
		}, remove},
		"the other is dead, too: the collector knows": {func(s *situation, other *claim) {
			delete(s.byUID, other.ref.UID)
			delete(s.claims, other.ref.UID)
		}, leave},
		"its own was orphaned": {func(s *situation, _ *claim) { s.gone["uid-a"] = true }, leave},
		"its own reference is still there: the collector is at work": {func(s *situation, _ *claim) {
			s.refersTo("uid-a", "uid-b")
		}, leave},
		"not while it is not known what a third one wants": {func(s *situation, _ *claim) {
			third := s.claimOf(s.t, resource(s.t, "c", 2, byNone), 3)
			third.rendered, third.unread = impsync.Rendered{}, true
			s.refersTo("uid-b", "uid-c")
		}, leave},
		"its own reference is still there, and its end was seen": {func(s *situation, _ *claim) {
			s.gone["uid-a"] = false
			s.refersTo("uid-a", "uid-b")
		}, remove},
		"not while the other has a problem: its last word stays": {func(_ *situation, other *claim) {
			other.problem = errors.New("x")
		}, leave},
		"its own is going still": {func(s *situation, _ *claim) {
			r, now := resource(s.t, "a", 0, byName), metav1.Now()
			r.DeletionTimestamp = &now
			s.byUID["uid-a"] = r
		}, leave},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				winner := s.claimOf(t, resource(t, "a", 0, byName), 7)
				s.there(winner, func(m *metav1.PartialObjectMetadata) { m.OwnerReferences[0].UID = "uid-b" })
				delete(s.byUID, "uid-a")
				delete(s.claims, "uid-a")
				delete(s.byTarget["pull"], "uid-a")
				other := s.claimOf(t, resource(t, "b", 1, byNone), 3)
				test.change(s, other)
				d := s.decides()
				require.Equal(t, test.verb, d.verb, d.verb)
				if d.verb == remove {
					require.Same(t, other, d.winner)
					require.Empty(t, d.owners, "it has the reference of the one that is asked about")
				}
			})
		})
	}
}

// Of several that hold it, each that has Pod rules may want it still.
func TestEachThatHoldsASecretAndHasPodRulesIsAsked(t *testing.T) {
	t.Parallel()
	for name, targets := range map[string][2]string{
		"the first": {byPods, byNone}, "the second": {byNone, byPods}, "both": {byPods, byPods},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				winner := s.claimOf(t, resource(t, "a", 0, byName), 7)
				s.there(winner)
				s.refersTo("uid-b", "uid-c")
				delete(s.byUID, "uid-a")
				delete(s.claims, "uid-a")
				delete(s.byTarget["pull"], "uid-a")
				for i, target := range targets {
					s.claimOf(t, resource(t, []string{"b", "c"}[i], 1+i, target), 3)
				}
				require.Equal(t, leave, s.decides().verb, "it lingers")
				s.now = s.now.Add(s.config.DemandLinger)
				d := s.decides()
				require.Equal(t, remove, d.verb)
				require.True(t, d.byPods)
				for i, target := range targets { // as the reports may tell
					uid := types.UID([]string{"uid-b", "uid-c"}[i])
					if state := s.demand.states[demandKey{"n", uid}]; target == byPods {
						was := *state
						state.ended, state.unknown = s.now, false
						require.Equal(t, leave, s.decides().verb, uid)
						*state = was
					}
				}
			})
		})
	}
}

// Its owner lives and has no Pod rules, but another one that has claimed it does.
func TestWhoHoldsTheSecretOfALiveOwnerIsAskedForItsPods(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.there(s.claimOf(t, resource(t, "a", 0, byNone), 7))
		s.refersTo("uid-a", "uid-b")
		s.claimOf(t, resource(t, "b", 1, byPods), 3)
		d := s.decides()
		require.Equal(t, remove, d.verb)
		require.True(t, d.byPods)
		s.demand.states[demandKey{"n", "uid-b"}] = &demandState{ended: s.now} // as the reports have told
		require.Equal(t, leave, s.decides().verb)
		s.now = s.now.Add(s.config.DemandLinger)
		require.Equal(t, remove, s.decides().verb)
	})
}

// Whoever has Pod rules may want it without a word yet: the reports are asked.
func TestNothingIsDeletedThatAReportDemands(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(t *testing.T, s *situation, a, b *v1alpha1.ImagePullSecret){
		"its owner does not want it, and another claims the name": func(t *testing.T, s *situation, a, b *v1alpha1.ImagePullSecret) {
			s.there(s.claimOf(t, a, 7))
			s.claimOf(t, b, 3)
		},
		"its owner waits for it to go, and another holds it": func(t *testing.T, s *situation, a, b *v1alpha1.ImagePullSecret) {
			s.there(s.claimOf(t, a, 7))
			s.refersTo("uid-a", "uid-b")
			s.claimOf(t, b, 3)
			was := a.DeepCopy()
			now := metav1.Now()
			a.DeletionTimestamp, a.Finalizers = &now, []string{metav1.FinalizerDeleteDependents}
			s.resourceChanged(types.NamespacedName{Name: "a"}, &was, &a)
			delete(s.claims, a.UID)
			delete(s.byTarget["pull"], a.UID)
		},
		"its owner is gone, its revision edited, and another holds it": func(t *testing.T, s *situation, a, b *v1alpha1.ImagePullSecret) {
			s.there(s.claimOf(t, a, 7), func(m *metav1.PartialObjectMetadata) { delete(m.Annotations, impsync.AnnotationRevision) })
			s.refersTo("uid-a", "uid-b")
			s.claimOf(t, b, 3)
			s.resourceChanged(types.NamespacedName{Name: "a"}, &a, nil)
			delete(s.claims, a.UID)
			delete(s.byTarget["pull"], a.UID)
			s.server().resources = []*v1alpha1.ImagePullSecret{b}
		},
		"Pod rules come into force while the others are asked": func(t *testing.T, s *situation, a, b *v1alpha1.ImagePullSecret) {
			s.there(s.claimOf(t, a, 7))
			s.refersTo("uid-a", "uid-b")
			s.claimOf(t, resource(t, "b", 1, byNone), 3)
			b.Generation++
			s.server().before = func(*http.Request) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.claimOf(t, b, 4)
			}
			s.server().answers[readOfSecret] = asAnswer(applied(t, "n", s.claims["uid-a"].rendered.Target))
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				a, b := resource(t, "a", 0, byNone), resource(t, "b", 1, byPods)
				s.server().resources = []*v1alpha1.ImagePullSecret{a, b}
				s.server().answers = map[string]any{listOfReports: reports(t, "uid-b")}
				prepare(t, s, a, b)
				for range 2 {
					_ = s.reconcileTarget(t.Context(), s.key)
					require.NotContains(t, s.server().asked(), deletion)
					<-time.After(s.config.DemandLinger)
				}
				s.server().answers[listOfReports] = reports(t)
				_ = s.reconcileTarget(t.Context(), s.key)
				require.Contains(t, s.server().asked(), deletion, "nobody demands it")
			})
		})
	}
}

// A spec that cannot be used leaves everything as it is, also where the last good one does
// not select a namespace any more.
func TestAResourceWithAProblemLosesNothing(t *testing.T) {
	const lastGood = `{secret: {name: pull, labels: {l: "1"}}, namespaces: {labels: [{matchLabels: {team: a}}]}}`
	t.Parallel()
	for name, newest := range map[string]string{
		"a bad operator":               `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: b}}, {matchExpressions: [{key: x, operator: Foo}]}]}}`,
		"a name that is not allowed":   `{secret: {name: nope}, namespaces: {labels: [{matchLabels: {team: b}}]}}`,
		"a bad operator beside a name": `{secret: {name: pull}, namespaces: {names: [n], labels: [{matchExpressions: [{key: x, operator: Foo}]}]}}`,
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				s.namespace("n", map[string]string{"team": "b"})
				was := newRendering(t, s)
				was.resource = resource(t, "a", 0, lastGood)
				was.resolved = resolve(nil, &state{}, noon)
				c := s.claimOf(t, was.resource, 7)
				selection, _, err := impsync.CompileSelection(was.resource.Spec.Target.Namespaces, was.resource.Spec.Target.NamespacesWithPods)
				require.NoError(t, err)
				c.setRendered(was.remembers(7), selection)
				c.state = was.known
				c.outcomes["n"] = outcome{kind: delivered, counter: 7}
				s.there(c)
				require.Equal(t, remove, s.decides().verb, "else it would go")
				r := resource(t, "a", 0, newest)
				r.Generation = 2
				s.byUID[r.UID] = r
				require.NoError(t, s.reconcileResource(t.Context(), r.UID))
				require.Error(t, c.problem)
				require.Equal(t, leave, s.decides().verb)
				s.queuedTargets()

				r = resource(t, "a", 0, lastGood)
				r.Generation = 3
				s.byUID[r.UID] = r
				require.NoError(t, s.reconcileResource(t.Context(), r.UID))
				require.NoError(t, c.problem)
				require.Equal(t, []string{"n/pull"}, s.queuedTargets())
				require.Equal(t, remove, s.decides().verb)
			})
		})
	}
}

// The problem is over, but what the resource says now cannot be written.
func TestAResourceThatCannotBeRenderedLosesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byNone), 7)
		s.there(c)
		require.Equal(t, remove, s.decides().verb, "else it would go")
		c.failure = errors.New("x")
		require.Equal(t, leave, s.decides().verb)
	})
}

// One resource whose newest spec cannot be rendered holds back what it may want, and no more.
func TestAResourceThatIsNotSettledHoldsBackOnlyWhatItMayWant(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		target string
		verb   verb
	}{
		"it selects the namespace":             {byName, leave},
		"it has Pod rules":                     {byPods, leave},
		"it selects another one":               {`{secret: {name: pull}, namespaces: {names: [m]}}`, remove},
		"it selects by a label that is not on": {byOtherLabel, remove},
		"it has another target name":           {`{secret: {name: other}, namespaces: {names: [n]}}`, remove},
		"nobody knows what it selects":         {`{secret: {name: pull}, namespaces: {labels: [{matchExpressions: [{key: x, operator: Foo}]}]}}`, remove},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				s.there(s.claimOf(t, resource(t, "a", 0, byNone), 7))
				other := resource(t, "b", 1, test.target)
				s.byUID[other.UID] = other
				require.Equal(t, test.verb, s.decides().verb)
			})
		})
	}
}

// The same, and the other has Pod rules: perhaps its demand is on its way.
func TestASecretOfADeadResourceLingersForAnotherOne(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		winner := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(winner, func(m *metav1.PartialObjectMetadata) { m.OwnerReferences[0].UID = "uid-b" })
		delete(s.byUID, "uid-a")
		delete(s.claims, "uid-a")
		delete(s.byTarget["pull"], "uid-a")
		other := s.claimOf(t, resource(t, "b", 1, byPods), 3)
		require.Equal(t, leave, s.decides().verb, "it has nothing to do with the other's credentials")
		s.now = s.now.Add(s.config.DemandLinger - 1)
		require.Equal(t, leave, s.decides().verb)
		s.now = s.now.Add(1)
		d := s.decides()
		require.Equal(t, remove, d.verb, d.verb)
		require.Same(t, other, d.winner)
		require.True(t, d.byPods, "the reports are asked")
	})
}

func TestWithoutAFreshLeaseNothingIsTold(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.guard.renewed.Store(nil)
		err := s.reconcileTarget(t.Context(), s.key)
		require.ErrorIs(t, err, errLeaseStale)
		require.Equal(t, map[string]string{"a in n": "pending at 0"}, s.outcomes())
		require.ErrorIs(t, s.retire(t.Context(), "uid-x"), errLeaseStale)
	})
}

func TestDecideTakesOverWhatADeadResourceLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		was := resource(t, "a", 0, byName)
		old := s.claimOf(t, was, 12)
		s.there(old)
		delete(s.claims, was.UID)
		delete(s.byTarget["pull"], was.UID)
		s.gone[was.UID] = false
		again := resource(t, "a", 5, byName)
		again.UID = "uid-again"
		c := s.claimOf(t, again, 1)
		d := s.decides()
		require.Equal(t, update, d.verb, "in place, whatever the other's counter was")
		require.Same(t, c, d.winner)
		require.Equal(t, []impsync.ResourceRef{c.ref}, d.owners)
	})
}

func TestOfTwoResourcesThatClaimOneTargetTheOlderWins(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		olderThan int // b is created so many minutes after a
		winner    string
	}{
		"b is younger":                      {1, "a"},
		"b is older":                        {-1, "b"},
		"the same age: the name decides it": {0, "a"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				a := s.claimOf(t, resource(t, "a", 0, byName), 7)
				b := s.claimOf(t, resource(t, "b", test.olderThan, byName), 3)
				winner, loser := a, b
				if test.winner == "b" {
					winner, loser = b, a
				}
				d := s.decides()
				require.Equal(t, create, d.verb)
				require.Same(t, winner, d.winner)
				require.Equal(t, winner.rendered.Target.Revision(), d.target.Revision())
				require.ElementsMatch(t, []types.UID{winner.ref.UID, loser.ref.UID}, d.target.Owners())
				require.Equal(t, []impsync.ResourceRef{winner.ref, loser.ref}, d.owners)
				require.Equal(t, map[string]string{winner.ref.Name + " in n": "pending at 0", loser.ref.Name + " in n": "conflicted at 0"}, s.outcomes())
				require.Contains(t, loser.outcomes["n"].message, "the older ImagePullSecret "+winner.ref.Name+" claims the same Secret")

				// What a node has created gets an owner reference to both.
				s.there(winner)
				d = s.decides()
				require.Equal(t, update, d.verb)
				require.Equal(t, winner.rendered.Target.Revision(), d.target.Revision())
				require.ElementsMatch(t, []types.UID{a.ref.UID, b.ref.UID}, d.target.Owners())
				s.mirrorOf(t, "pull", applied(t, "n", d.target))
				require.Zero(t, s.decides())
				require.Equal(t, fmt.Sprintf("delivered at %d", winner.rendered.Target.Revision().Counter), s.outcomes()[winner.ref.Name+" in n"])

				// The winner goes: the Secret is handed over in place.
				delete(s.byUID, winner.ref.UID)
				delete(s.claims, winner.ref.UID)
				delete(s.byTarget["pull"], winner.ref.UID)
				s.gone[winner.ref.UID] = false
				d = s.decides()
				require.Equal(t, update, d.verb)
				require.Same(t, loser, d.winner)
				require.Equal(t, []types.UID{loser.ref.UID}, d.target.Owners())
				require.Equal(t, loser.rendered.Target.Revision(), d.target.Revision())
			})
		})
	}
}

// References of others are neither put on nor taken off without their word, and what else
// there is to change does not wait for it: a resource that is gone must not get the Secret
// collected, nor may one lose it that still wants it.
func TestReferencesOfOthersAreChangedOnlyOnTheirWord(t *testing.T) {
	t.Parallel()
	const other = listOfResources + "/b"
	gone := apierrors.NewNotFound(v1alpha1.Resource.GroupResource(), "b")
	changed := func(r *v1alpha1.ImagePullSecret) *v1alpha1.ImagePullSecret {
		r = r.DeepCopy()
		r.Generation++
		return r
	}
	tests := map[string]struct {
		// claims: the other one claims the Secret, and its reference is to be put on; else it
		// is to be taken off.
		claims bool
		edit   func(s *situation, other *v1alpha1.ImagePullSecret, c *claim)
		asked  []string
		// sure: it is done.
		sure bool
	}{
		"off: it says what is in force": {false, func(*situation, *v1alpha1.ImagePullSecret, *claim) {}, []string{listOfResources}, true},
		"off: it says something else, as nobody has told yet": {false, func(s *situation, other *v1alpha1.ImagePullSecret, _ *claim) {
			s.server().resources[1] = changed(other)
		}, []string{listOfResources}, false},
		"off: it says something else, which is not in force yet": {false, func(s *situation, other *v1alpha1.ImagePullSecret, _ *claim) {
			s.byUID[other.UID] = changed(other)
		}, nil, false},
		"off: it has a problem": {false, func(_ *situation, _ *v1alpha1.ImagePullSecret, c *claim) {
			c.problem = errors.New("x")
		}, nil, false},
		"off: nobody can be asked": {false, func(s *situation, _ *v1alpha1.ImagePullSecret, _ *claim) {
			s.server().answers[listOfResources] = apierrors.NewInternalError(errors.New("x"))
		}, []string{listOfResources}, false},
		"on: it is there": {true, func(*situation, *v1alpha1.ImagePullSecret, *claim) {}, []string{other}, true},
		"on: it is gone, as nobody has told yet": {true, func(s *situation, _ *v1alpha1.ImagePullSecret, _ *claim) {
			s.server().answers[other] = gone
		}, []string{other}, false},
		"on: nobody can be asked": {true, func(s *situation, _ *v1alpha1.ImagePullSecret, _ *claim) {
			s.server().answers[other] = apierrors.NewInternalError(errors.New("x"))
		}, []string{other}, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				target := byNone
				if test.claims {
					target = byName
				}
				a, b := resource(t, "a", 0, byName), resource(t, "b", 1, target)
				winner, second := s.claimOf(t, a, 7), s.claimOf(t, b, 3)
				present := []impsync.ResourceRef{winner.ref}
				if !test.claims {
					present = append(present, second.ref)
				}
				expectation, err := winner.expect(present)
				require.NoError(t, err)
				s.server().resources = []*v1alpha1.ImagePullSecret{a, b}
				s.server().answers = map[string]any{other: b}
				test.edit(s, b, second)
				then := func(requests ...string) []string { return append(slices.Clone(test.asked), requests...) }

				s.mirrorOf(t, "pull", applied(t, "n", expectation.Target()))
				err = s.reconcileTarget(t.Context(), s.key)
				require.Equal(t, impsync.ClassRetry, impsync.ClassifyError(err))
				if test.sure {
					require.ErrorIs(t, err, syscall.ECONNREFUSED)
					require.Equal(t, then(writeOfSecret), s.server().asked())
					require.Equal(t, "failed at 7", s.outcomes()["a in n"])
					s.decides()
					require.Equal(t, "failed at 7", s.outcomes()["a in n"], "until it is done")
				} else {
					require.ErrorIs(t, err, errBehind, "it is tried again")
					require.Equal(t, test.asked, s.server().asked())
					require.Equal(t, "delivered at 7", s.outcomes()["a in n"], "its content is")
				}

				older := applied(t, "n", expectation.Target())
				at("6")(older)
				s.mirrorOf(t, "pull", older)
				require.ErrorIs(t, s.reconcileTarget(t.Context(), s.key), syscall.ECONNREFUSED)
				require.Equal(t, then(writeOfSecret), s.server().asked(), "the rotation does not wait")
			})
		})
	}
}

// Another one that claims it is gone, as nobody has told yet: the Secret comes back.
func TestADeletedSecretComesBackWhoeverElseClaimedIt(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		a := resource(t, "a", 0, byName)
		winner := s.claimOf(t, a, 7)
		s.claimOf(t, resource(t, "b", 1, byName), 3)
		winner.outcomes["n"] = outcome{kind: delivered, counter: 7}
		const own, other = listOfResources + "/a", listOfResources + "/b"
		s.server().answers = map[string]any{own: a}
		require.ErrorIs(t, s.reconcileTarget(t.Context(), s.key), syscall.ECONNREFUSED)
		require.Equal(t, []string{own, other, writeOfSecret}, s.server().asked())
	})
}

// answers has the server create and update the Secret as it is told to.
func answers(t *testing.T, s *situation, names ...string) (winner *claim, creates, updates *int) {
	t.Helper()
	s.server().answers = map[string]any{}
	var refs []impsync.ResourceRef
	for i, name := range names {
		r := resource(t, name, i, byName)
		refs = append(refs, s.claimOf(t, r, 7).ref)
		s.server().answers[listOfResources+"/"+name] = r
	}
	winner = s.claims[refs[0].UID]
	winner.outcomes["n"] = outcome{kind: delivered, counter: 7}
	creates, updates = new(int), new(int)
	s.server().before = func(request *http.Request) {
		if request.Method != http.MethodPatch {
			return
		}
		body, err := io.ReadAll(request.Body)
		require.NoError(t, err)
		if strings.Contains(string(body), "secret-in-n") {
			*updates++
		} else {
			*creates++
		}
		owners := slices.DeleteFunc(slices.Clone(refs), func(ref impsync.ResourceRef) bool { return !strings.Contains(string(body), `"uid":"`+string(ref.UID)) })
		expectation, err := winner.expect(owners)
		require.NoError(t, err)
		written := asAnswer(applied(t, "n", expectation.Target()))
		s.server().answers[writeOfSecret], s.server().answers[readOfSecret] = written, written
	}
	return winner, creates, updates
}

// Each time it comes back with one write, as long as it is prompt.
func TestWhoeverDeletesTheSecretAgainAndAgainHasItBackEverMoreSeldom(t *testing.T) {
	t.Parallel()
	gone := apierrors.NewNotFound(v1alpha1.Resource.GroupResource(), "b")
	for name, test := range map[string]struct {
		claimants []string
		gone      bool
		owners    []types.UID
	}{
		"one claims it": {[]string{"a"}, false, []types.UID{"uid-a"}},
		"two do":        {[]string{"a", "b"}, false, []types.UID{"uid-a", "uid-b"}},
		"the second is gone, as nobody has told yet": {[]string{"a", "b"}, true, []types.UID{"uid-a"}},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				_, creates, updates := answers(t, s, test.claimants...)
				if test.gone {
					s.server().answers[listOfResources+"/b"] = gone
				}
				for range promptRepairs {
					s.mirrorOf(t, "pull")
					_ = s.reconcileTarget(t.Context(), s.key)
					secret, _ := s.targets["pull"].Get(types.NamespacedName{Namespace: "n", Name: "pull"})
					require.Equal(t, test.owners, secret.OwnerReferences)
					_ = s.reconcileTarget(t.Context(), s.key)
					require.Equal(t, "delivered at 7", s.outcomes()["a in n"])
				}
				for range 10 {
					s.mirrorOf(t, "pull") // it is deleted at once
					_ = s.reconcileTarget(t.Context(), s.key)
				}
				require.Equal(t, promptRepairs, *creates)
				require.Zero(t, *updates)
				require.Equal(t, "failed at 7", s.outcomes()["a in n"])
			})
		})
	}
}

// The watch tells of the deletion first.
func TestWhoeverReplacesTheSecretAgainAndAgainHasItRepairedEverMoreSeldom(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		winner, creates, updates := answers(t, s, "a")
		theirs := applied(t, "n", winner.rendered.Target)
		at("6")(theirs)
		write := s.server().before
		s.server().before = func(request *http.Request) {
			write(request)
			if *creates > 0 { // there is theirs
				*creates = 0
				s.server().answers[writeOfSecret] = apierrors.NewConflict(impsync.SecretResource.GroupResource(), "pull", nil)
				s.server().answers[readOfSecret] = asAnswer(theirs)
			}
		}
		for range 10 {
			s.mirrorOf(t, "pull")
			_ = s.reconcileTarget(t.Context(), s.key)
		}
		require.Equal(t, promptRepairs, *updates)
	})
}

// The same, and what is asked before a deletion.
func TestQuestionsThatTakeLongDoNotHoldBackADeletion(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		owner string
		each  time.Duration
	}{"resources and reports": {byNone, 6 * time.Second}, "the namespace as well": {byOtherLabel, 4 * time.Second}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				a, b := resource(t, "a", 0, test.owner), resource(t, "b", 1, byPods)
				s.there(s.claimOf(t, a, 7))
				s.claimOf(t, b, 3)
				s.server().resources = []*v1alpha1.ImagePullSecret{a, b}
				s.server().answers = map[string]any{listOfNamespaces: noNamespaces, listOfReports: reports(t)}
				s.server().slow(test.each)
				_ = s.reconcileTarget(t.Context(), s.key)
				require.Contains(t, s.server().asked(), deletion)
			})
		})
	}
}

// The answers take long, but they come.
func TestQuestionsThatTakeLongDoNotHoldBackARotation(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		others    string
		reference bool
		each      time.Duration
	}{
		"references to put on":   {byName, false, 6 * time.Second},
		"references to take off": {byOtherLabel, true, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				winner := s.claimOf(t, resource(t, "a", 0, byName), 7)
				winner.outcomes["n"] = outcome{kind: delivered, counter: 6}
				resources := []*v1alpha1.ImagePullSecret{s.byUID["uid-a"]}
				all := []impsync.ResourceRef{winner.ref}
				s.server().answers = map[string]any{listOfNamespaces: noNamespaces}
				for i, name := range []string{"b", "c", "d"} {
					r := resource(t, name, i+1, test.others)
					all = append(all, s.claimOf(t, r, 3).ref)
					resources = append(resources, r)
					s.server().answers[listOfResources+"/"+name] = r
				}
				before, after := []impsync.ResourceRef{winner.ref}, all
				if test.reference {
					before, after = after, before
				}
				expectation, err := winner.expect(before)
				require.NoError(t, err)
				older := applied(t, "n", expectation.Target())
				at("6")(older)
				s.mirrorOf(t, "pull", older)
				expectation, err = winner.expect(after)
				require.NoError(t, err)
				s.server().resources = resources
				s.server().answers[writeOfSecret] = asAnswer(applied(t, "n", expectation.Target()))
				s.server().slow(test.each)
				begun := time.Now()
				_ = s.reconcileTarget(t.Context(), s.key)
				require.Contains(t, s.server().asked(), writeOfSecret)
				require.Equal(t, "delivered at 7", s.outcomes()["a in n"])
				require.Less(t, time.Since(begun), 4*impsync.CallTimeout)
			})
		})
	}
}

// Where it was not for a while, and the reference of another cannot be settled.
func TestContentThatIsRightAgainIsDelivered(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		winner, second := s.claimOf(t, resource(t, "a", 0, byName), 7), s.claimOf(t, resource(t, "b", 1, byNone), 3)
		second.problem = errors.New("x")
		winner.outcomes["n"] = outcome{kind: delivered, counter: 7}
		expectation, err := winner.expect([]impsync.ResourceRef{winner.ref, second.ref})
		require.NoError(t, err)
		right := applied(t, "n", expectation.Target())
		older := right.DeepCopy()
		at("6")(older)
		s.mirrorOf(t, "pull", older)
		require.ErrorIs(t, s.reconcileTarget(t.Context(), s.key), syscall.ECONNREFUSED)
		require.Equal(t, "failed at 7", s.outcomes()["a in n"])
		require.Equal(t, []string{writeOfSecret}, s.server().asked())

		s.server().answers = map[string]any{writeOfSecret: asAnswer(right)}
		for range 3 {
			require.ErrorIs(t, s.reconcileTarget(t.Context(), s.key), errBehind)
			require.Equal(t, "delivered at 7", s.outcomes()["a in n"])
		}
		require.Equal(t, []string{writeOfSecret}, s.server().asked(), "once")
	})
}

func TestWhereOnlyTheYoungerSelectsItGetsTheSecret(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		older := s.claimOf(t, resource(t, "a", 0, byNone), 7)
		younger := s.claimOf(t, resource(t, "b", 5, byName), 3)
		s.there(older)
		d := s.decides()
		require.Equal(t, update, d.verb)
		require.Same(t, younger, d.winner)
		require.Equal(t, map[string]string{"b in n": "pending at 0"}, s.outcomes())
	})
}

func TestWhatAResourceDeliveredStaysItsUntilItIsKnownWhatItWantsNow(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		s.there(s.claimOf(t, r, 7))
		s.claimOf(t, resource(t, "b", 1, byName), 3)
		// A new term, and its rendered Secret is gone.
		older := newClaim(r, impsync.Rendered{})
		s.putClaim(older)
		require.Equal(t, leave, s.decides().verb, "it is not handed to the younger")
		older.unread, older.failure = false, errors.New("x")
		require.Equal(t, leave, s.decides().verb, "nor while it cannot be rendered")
		older.failure = nil // it has nothing to deliver
		d := s.decides()
		require.Equal(t, update, d.verb)
		require.Equal(t, "b", d.winner.ref.Name)
	})
}

func TestAResourceThatIsNoLongerSelectedLeavesNoOutcome(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		m := s.there(c)
		s.decides()
		require.Equal(t, map[string]string{"a in n": "delivered at 7"}, s.outcomes())
		none := resource(t, "a", 0, byNone)
		selection, _, err := impsync.CompileSelection(none.Spec.Target.Namespaces, none.Spec.Target.NamespacesWithPods)
		require.NoError(t, err)
		c.setRendered(renderedAt(t, none, 8), selection)

		d := s.decides()
		require.Equal(t, remove, d.verb)
		require.Equal(t, map[string]string{"a in n": "delivered at 7"}, s.outcomes(), "as long as it is there, it counts")
		s.forget(s.key, impsync.ExistingOf(m))
		require.Zero(t, s.decides())
		require.Empty(t, s.outcomes())
	})
}

func TestASecretStaysAMinuteAfterTheLastPod(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byPods), 7)
		s.there(c)
		key := demandKey{"n", "uid-a"}
		s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
		s.demand.replace("n2", demandsFrom("n uid-a"), s.now, always)
		require.Zero(t, s.decides())
		require.Equal(t, map[string]string{"a in n": "delivered at 7"}, s.outcomes())

		s.demand.replace("n1", nil, s.now, always)
		require.Zero(t, s.decides())
		s.demand.replace("n2", nil, s.now, always)
		require.Zero(t, s.decides(), "it lingers")
		require.Empty(t, s.queuedTargets())
		<-time.After(DefaultDemandLinger - time.Second)
		require.Zero(t, s.decide(s.key, time.Now()))
		<-time.After(time.Second)
		synctest.Wait()
		require.Equal(t, []string{"n/pull"}, s.queuedTargets(), "it comes back by itself")
		d := s.decide(s.key, time.Now())
		require.Equal(t, remove, d.verb)
		require.True(t, d.byPods, "the reports are read again first")

		// A Pod that comes in the last moment keeps it.
		s.demand.replace("n3", demandsFrom("n uid-a"), time.Now(), always)
		require.Zero(t, s.decide(s.key, time.Now()))
		s.demand.replace("n3", nil, time.Now(), always)
		require.Zero(t, s.decide(s.key, time.Now()), "and the minute begins anew")
		require.Contains(t, s.demand.states, key)

		// With the Secret goes the memory of the demand.
		s.mirrorOf(t, "pull")
		require.Zero(t, s.decide(s.key, time.Now()))
		require.NotContains(t, s.demand.states, key)
		require.Empty(t, s.outcomes())
	})
}

func TestASecretThatANodeHasJustCreatedStaysUntilItsReportMustBeThere(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byPods), 7)
		s.there(c)
		require.Zero(t, s.decides())
		require.Equal(t, map[string]string{"a in n": "delivered at 7"}, s.outcomes())
		require.Zero(t, s.decide(s.key, s.now.Add(DefaultDemandLinger-1)))
		d := s.decide(s.key, s.now.Add(DefaultDemandLinger))
		require.Equal(t, remove, d.verb)
		require.True(t, d.byPods)
		s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
		require.Zero(t, s.decide(s.key, s.now.Add(DefaultDemandLinger)))
	})
}

// A node whose agent is not there yet may have the Pods that a Secret is for.
func TestASecretThatNothingIsKnownOfStaysWhileANodeHasNoAgent(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byPods), 7)
		s.there(c)
		s.node("n1", false)
		s.updateNodesWithoutAgent()
		require.Zero(t, s.decides())
		for range 10 {
			<-time.After(DefaultDemandLinger)
			require.Zero(t, s.decide(s.key, time.Now()))
		}
		s.node("n1", true)
		s.updateNodesWithoutAgent()
		require.Zero(t, s.decide(s.key, time.Now()), "its report has just come")
		<-time.After(DefaultDemandLinger)
		require.Equal(t, remove, s.decide(s.key, time.Now()).verb)

		// Of a demand that was seen to end, all is known.
		s.demand.replace("n1", demandsFrom("n uid-a"), time.Now(), always)
		s.demand.replace("n1", nil, time.Now(), always)
		s.node("n2", false)
		s.updateNodesWithoutAgent()
		<-time.After(DefaultDemandLinger)
		require.Equal(t, remove, s.decide(s.key, time.Now()).verb)
	})
}

// No status may count less than what is selected, just because not all was looked at yet.
func TestWhatAClaimSelectsIsPendingFromTheStart(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		for _, name := range []string{"labelled", "podded", "neither", "kube-x"} {
			s.namespace(name, map[string]string{"l": name})
		}
		s.namespaces.Put(types.NamespacedName{Name: "going"}, namespaceMeta{labels: map[string]string{"l": "labelled"}, terminating: true})
		c := s.claimOf(t, resource(t, "a", 0, `{secret: {name: pull}, namespaces: {names: [kube-x, absent], labels: [{matchLabels: {l: labelled}}]}, namespacesWithPods: {labels: [{}]}}`), 7)
		s.demand.replace("n1", demandsFrom("podded uid-a", "neither uid-b"), s.now, always)
		s.demand.replace("n2", demandsFrom("neither uid-a"), s.now, always)
		s.demand.replace("n2", nil, s.now, always)
		older := applied(t, "labelled", c.rendered.Target)
		at("5")(older)
		foreign := applied(t, "podded", c.rendered.Target)
		users(foreign)
		s.mirrorOf(t, "pull", older, foreign)

		s.expectOutcomes(c)
		require.Equal(t, map[string]string{"a in kube-x": "excluded at 0", "a in labelled": "pending at 5", "a in podded": "pending at 0"}, s.outcomes())
		s.namespace("was", nil)
		c.outcomes["was"] = outcome{kind: delivered, counter: 6}
		c.outcomes["gone"] = outcome{kind: delivered, counter: 6}
		s.expectOutcomes(c)
		require.Equal(t, "pending at 6", s.outcomes()["a in was"])
		require.NotContains(t, c.outcomes, "gone", "a namespace that is gone is no more looked at")
		delete(s.targets, "pull")
		s.expectOutcomes(c)
	})
}

func TestWhatIsNotThereIsNotCreatedForADemandThatHasEnded(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byPods), 7)
		require.Zero(t, s.decides())
		s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
		require.Equal(t, create, s.decides().verb)
		s.demand.replace("n1", nil, s.now, always)
		require.Zero(t, s.decides())
		require.Empty(t, s.outcomes())
		require.Empty(t, s.demand.states)
	})
}

func TestWhatANamespaceRuleDeselectsGoesAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, `{secret: {name: pull}, namespaces: {labels: [{matchLabels: {team: x}}]}, namespacesWithPods: {labels: [{}]}}`), 7)
		s.namespace("n", map[string]string{"team": "x"})
		s.there(c)
		require.Zero(t, s.decides())
		s.namespace("n", nil)
		d := s.decides()
		require.Equal(t, remove, d.verb)
		require.True(t, d.byPods, "a Pod may have come that the watch has not told of")

		// Not where Pods select it as well.
		s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
		require.Zero(t, s.decides())
		require.Equal(t, map[string]string{"a in n": "delivered at 7"}, s.outcomes())
	})
}

// Only a resource's own Secret waits for Pods that may come back: another's is none of
// its business, nor is a user's copy.
func TestOnlyItsOwnSecretLingers(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*metav1.PartialObjectMetadata){
		"another resource's": func(m *metav1.PartialObjectMetadata) { m.Labels[impsync.LabelOwnerUID] = "dead" },
		"a user's copy":      unmanaged,
		"a user's":           users,
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byPods), 7)
				s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
				s.demand.replace("n1", nil, s.now, always)
				s.there(c, edit)
				require.Zero(t, s.decides())
				require.Empty(t, s.demand.states)
				require.NotContains(t, s.outcomes(), "delivered")
			})
		})
	}
}

func TestAfterANewNameTheSecretOfTheOldOneGoes(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 7)
		s.there(c)
		renamed := resource(t, "a", 0, `{secret: {name: other}, namespaces: {names: ["n"]}}`)
		c.setRendered(renderedAt(t, renamed, 8), c.selection)
		s.mirrorOf(t, "other")
		s.putClaim(c)
		require.Empty(t, s.byTarget["pull"])
		require.Equal(t, remove, s.decides().verb)
		require.Equal(t, create, s.decide(targetKey{"n", "other"}, s.now).verb)
	})
}

func TestExpectationsAreMadeOnceForEachSetOfOwners(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		a := s.claimOf(t, resource(t, "a", 0, byName), 7)
		b := s.claimOf(t, resource(t, "b", 1, byName), 3)
		alone, err := a.expect([]impsync.ResourceRef{a.ref})
		require.NoError(t, err)
		both, err := a.expect([]impsync.ResourceRef{a.ref, b.ref})
		require.NoError(t, err)
		require.NotSame(t, alone, both)
		again, err := a.expect([]impsync.ResourceRef{a.ref})
		require.NoError(t, err)
		require.Same(t, alone, again)
		a.setRendered(a.rendered, a.selection)
		again, err = a.expect([]impsync.ResourceRef{a.ref})
		require.NoError(t, err)
		require.NotSame(t, alone, again, "a new content has new expectations")
	})
}

func TestConcludeNotesWhyNothingWasDone(t *testing.T) {
	t.Parallel()
	secrets := corev1.Resource("secrets")
	refused := apierrors.NewForbidden(secrets, "pull", errors.New("no"))
	const was = "delivered at 5"
	tests := map[string]struct {
		verb    verb
		err     error
		want    map[string]string
		message string
	}{
		"refused":               {update, refused, map[string]string{"a in n": "failed at 5"}, `secrets "pull" is forbidden: no`},
		"refused for now":       {update, apierrors.NewInternalError(errors.New("x")), map[string]string{"a in n": "failed at 5"}, "will be tried again: Internal error occurred: x"},
		"the namespace is gone": {update, apierrors.NewNotFound(secrets, "n"), map[string]string{"a in n": was}, ""},
		"another leads":         {update, fmt.Errorf("x: %w", errSuperseded), map[string]string{"a in n": was}, ""},
		"not deleted": {
			remove, refused, map[string]string{"a in n": was, "uid-a of n/pull": "undeletable"}, `secrets "pull" is forbidden: no`,
		},
		"not deleted for now": {
			remove, errors.New("x"), map[string]string{"a in n": was, "uid-a of n/pull": "undeletable"}, "will be tried again: x",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byName), 7)
				s.note(c, "n", &outcome{kind: delivered, counter: 5})
				<-time.After(time.Second)
				s.queuedStatuses()
				s.conclude(s.key, decision{verb: test.verb, winner: c, target: c.rendered.Target}, test.err)
				require.Equal(t, test.want, s.outcomes())
				require.Equal(t, test.message, c.outcomes["n"].message+s.undeletable[s.key].message)
				<-time.After(time.Second)
				synctest.Wait()
				require.Equal(t, test.message != "", len(s.queuedStatuses()) == 1)
				s.conclude(s.key, decision{verb: test.verb}, test.err) // of nobody
			})
		})
	}
}

func TestWhatCouldNotBeDeletedIsForgottenOnceItNeedNotBe(t *testing.T) {
	t.Parallel()
	for name, settle := range map[string]func(s *situation, c *claim){
		"it is gone": func(s *situation, _ *claim) { s.mirrorOf(s.t, "pull") },
		"it is wanted again": func(s *situation, c *claim) {
			*c = *newClaim(s.byUID["uid-a"], renderedAt(s.t, resource(s.t, "a", 0, byName), 7))
		},
		"the namespace is gone": func(s *situation, _ *claim) {
			s.namespaces.Drop(types.NamespacedName{Name: "n"}, func(namespaceMeta) bool { return true })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, byNone), 7)
				s.there(c)
				require.Error(t, s.reconcileTarget(t.Context(), s.key))
				require.Equal(t, map[string]string{"uid-a of n/pull": "undeletable"}, s.outcomes())
				require.Equal(t, []string{"n/pull: " + s.undeletable[s.key].message}, s.summarize(c).undeletable)
				require.Equal(t, remove, s.decides().verb)
				require.NotEmpty(t, s.undeletable, "still")
				<-time.After(time.Second)
				s.queuedStatuses()
				settle(s, c)
				s.decides()
				require.Empty(t, s.undeletable)
				<-time.After(time.Second)
				synctest.Wait()
				require.Equal(t, []string{"uid-a"}, s.queuedStatuses())
			})
		})
	}
}

// Every request fails, so that the first of each write tells what comes before it.
func TestWithoutAServerNothingIsWrittenBlindly(t *testing.T) {
	t.Parallel()
	const (
		secret = "/api/v1/namespaces/n/secrets/pull"
		owner  = "/apis/images.banzaicloud.io/v1alpha1/imagepullsecrets/a"
	)
	tests := map[string]struct {
		target string
		there  []func(*metav1.PartialObjectMetadata)
		absent bool
		asked  string
		// outcome is empty where there is none.
		outcome string
	}{
		"create": {byName, nil, true, "PATCH " + secret, "failed at 0"},
		"update": {byName, []func(*metav1.PartialObjectMetadata){at("6")}, false, "PATCH " + secret, "failed at 0"},
		"update, with an owner reference put back: does the owner live?": {
			byName, []func(*metav1.PartialObjectMetadata){orphaned}, false, "GET " + owner, "failed at 0",
		},
		"adopt: what is there now?": {byName, []func(*metav1.PartialObjectMetadata){imps}, false, "GET " + secret, "failed at 0"},
		"adopt, with an owner reference put back: does the owner live?": {
			byName, []func(*metav1.PartialObjectMetadata){imps, orphaned}, false, "GET " + owner, "failed at 0",
		},
		"delete: do the resources say what is in force?": {byNone, nil, false, listOfResources, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				c := s.claimOf(t, resource(t, "a", 0, test.target), 7)
				s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
				s.demand.replace("n1", nil, s.now.Add(-time.Hour), always)
				if test.target != byPods {
					clear(s.demand.states)
				}
				if !test.absent {
					s.there(c, test.there...)
				}
				err := s.reconcileTarget(t.Context(), s.key)
				require.Error(t, err)
				require.Equal(t, impsync.ClassRetry, impsync.ClassifyError(err))
				require.Equal(t, []string{test.asked}, s.server().asked())
				outcomes := s.outcomes()
				require.Equal(t, test.outcome, outcomes["a in n"])
				require.Equal(t, test.target != byName, outcomes["uid-a of n/pull"] == "undeletable")
				requireSilent(t, c.outcomes["n"].message+s.undeletable[s.key].message)
				requireSilent(t, err.Error())
			})
		})
	}
}

func TestWhatIsAskedBeforeADeletion(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ target, next string }{
		"what a label could select that is not here yet: does it?": {byOtherLabel, listOfNamespaces},
		"after the last Pod: is it the last?":                      {byPods, listOfReports},
		"where only Pods could want it: does one?": {
			`{secret: {name: pull, labels: {l: "1"}}, namespaces: {names: [m]}, namespacesWithPods: {labels: [{}]}}`,
			listOfReports,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				r := resource(t, "a", 0, test.target)
				c := s.claimOf(t, r, 7)
				s.demand.replace("n1", demandsFrom("n uid-a"), s.now, always)
				s.demand.replace("n1", nil, s.now.Add(-time.Hour), always)
				if test.target != byPods {
					clear(s.demand.states)
					c.outcomes["n"] = outcome{kind: delivered, counter: 7} // by a rule, until now
				}
				s.there(c)
				s.server().resources = []*v1alpha1.ImagePullSecret{r}
				require.Error(t, s.reconcileTarget(t.Context(), s.key))
				require.Equal(t, []string{listOfResources, test.next}, s.server().asked())
				require.Equal(t, "undeletable", s.outcomes()["uid-a of n/pull"])
			})
		})
	}
}

// No rule selects an excluded namespace, whatever its labels.
func TestTheLabelsOfAnExcludedNamespaceAreNotAskedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.key = targetKey{"kube-n", "pull"}
		s.namespace("kube-n", map[string]string{"other": "x"})
		owner := s.claimOf(t, resource(t, "a", 0, byNone), 7)
		s.mirrorOf(t, "pull", applied(t, "kube-n", owner.rendered.Target))
		s.claimOf(t, resource(t, "b", 1, byOtherLabel), 3)
		d := s.decides()
		require.Equal(t, remove, d.verb)
		require.False(t, d.byMetadata)
	})
}

func TestWhatIsAsItShouldBeIsNotAskedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(c)
		require.NoError(t, s.reconcileTarget(t.Context(), s.key))
		require.Empty(t, s.server().asked())
	})
}

func TestOutcomesMakeTheStatusDirtyOnlyWhereTheyChange(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		dirty := func() bool {
			<-time.After(time.Second)
			synctest.Wait()
			return len(s.queuedStatuses()) > 0
		}
		s.note(c, "n", nil)
		require.False(t, dirty())
		s.note(c, "n", &outcome{kind: failed, message: "x"})
		require.True(t, dirty())
		s.note(c, "n", &outcome{kind: failed, message: "x"})
		require.False(t, dirty())
		s.note(c, "n", &outcome{kind: failed, message: "y"})
		require.True(t, dirty())
		s.note(c, "n", nil)
		require.True(t, dirty())
		require.Empty(t, c.outcomes)
	})
}

func TestWhatAWriteReturnsIsKnown(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		require.Equal(t, create, s.decides().verb)
		m := applied(t, "n", c.rendered.Target)
		s.know(s.key, m)
		require.Zero(t, s.decides())
		older := applied(t, "n", c.rendered.Target)
		older.ResourceVersion = "99"
		at("6")(older)
		s.know(s.key, older)
		require.Zero(t, s.decides(), "an answer that was overtaken")

		other := impsync.ExistingOf(m)
		other.UID = "another"
		s.forget(s.key, other)
		require.Zero(t, s.decides())
		s.forget(s.key, impsync.ExistingOf(m))
		require.Equal(t, create, s.decides().verb)
	})
}

func TestANamespaceThatChangesIsLookedAtForEveryName(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.claimOf(t, resource(t, "b", 0, `{secret: {name: other}}`), 7)
		key := types.NamespacedName{Name: "n"}
		was := namespaceMeta{labels: map[string]string{"l": "1"}, annotations: map[string]string{"a": "1"}}
		for name, test := range map[string]struct {
			old, current *namespaceMeta
			want         []string
		}{
			"new":         {nil, &was, []string{"n/other", "n/pull"}},
			"gone":        {&was, nil, []string{"n/other", "n/pull"}},
			"the same":    {&was, &namespaceMeta{labels: map[string]string{"l": "1"}, annotations: map[string]string{"a": "1"}}, nil},
			"relabelled":  {&was, &namespaceMeta{labels: map[string]string{"l": "2"}, annotations: was.annotations}, []string{"n/other", "n/pull"}},
			"reannotated": {&was, &namespaceMeta{labels: was.labels}, []string{"n/other", "n/pull"}},
			"being ended": {&was, &namespaceMeta{labels: was.labels, annotations: was.annotations, terminating: true}, []string{"n/other", "n/pull"}},
		} {
			s.namespaceChanged(key, test.old, test.current)
			require.Equal(t, test.want, s.queuedTargets(), name)
		}
	})
}

func TestEverythingIsLookedAtWhenATermBegins(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.namespace("m", nil)
		old := applied(t, "x", renderedAt(t, resource(t, "a", 0, `{secret: {name: old}}`), 7).Target)
		dead := applied(t, "y", renderedAt(t, resource(t, "dead", 0, `{secret: {name: old}}`), 7).Target)
		s.mirrorOf(t, "old", old, dead)
		s.mirrorOf(t, "pull", applied(t, "z", c.rendered.Target))
		s.enqueueAllTargets()
		require.Equal(t, []string{"m/pull", "n/pull", "x/old", "y/old", "z/pull"}, s.queuedTargets())
		s.enqueueTargetsOf(c)
		require.Equal(t, []string{"x/old", "z/pull"}, s.queuedTargets(), "also those of an earlier name")
	})
}

func TestVerbsHaveNames(t *testing.T) {
	t.Parallel()
	var names []string
	for v := leave; v <= remove; v++ {
		names = append(names, v.String())
	}
	require.Equal(t, []string{"leave", "create", "update", "adopt", "delete"}, names)
}

func TestANamespaceThatGoesBeforeTheSecretsAreKnownLeavesNoOutcome(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.targets["pull"] = impsync.NewMirror(impsync.MirrorConfig[impsync.Existing]{Log: s.log}) // never synced
		s.expectOutcomes(c)
		require.Equal(t, map[string]string{"a in n": "pending at 0"}, s.outcomes())
		s.namespaces.Drop(types.NamespacedName{Name: "n"}, func(namespaceMeta) bool { return true })
		require.Zero(t, s.decides())
		require.Empty(t, s.outcomes())
	})
}

func TestALateFailureUnderAnEarlierNameIsNotTold(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		d := s.decides()
		require.Equal(t, create, d.verb)
		s.enqueueTargetsOf(c)
		c.withdrawn = true
		c.setRendered(impsync.Rendered{}, nil)
		clear(c.outcomes)
		s.putClaim(c)
		s.conclude(s.key, d, errors.New("too late"))
		require.Empty(t, s.outcomes())
	})
}

func TestASecretThatSomebodyChangesAgainAndAgainIsRepairedEverMoreSeldom(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.node("n1", true)
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(c)
		require.Zero(t, s.decides())
		require.Equal(t, map[string]string{"a in n": "delivered at 7"}, s.outcomes())
		s.there(c, edited)

		wait := []time.Duration{0, 0, 0, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second}
		for len(wait) < 12 {
			wait = append(wait, min(2*wait[len(wait)-1], 5*time.Minute))
		}
		for i, want := range wait {
			s.queuedTargets()
			if want > 0 {
				require.Zero(t, s.decide(s.key, time.Now()), "repair %d waits", i)
				require.Equal(t, map[string]string{"a in n": "failed at 7"}, s.outcomes())
				<-time.After(want - 1)
				synctest.Wait()
				require.Empty(t, s.queuedTargets())
				<-time.After(1)
				synctest.Wait()
				require.Equal(t, []string{"n/pull"}, s.queuedTargets(), "repair %d comes after %s", i, want)
			}
			d := s.decide(s.key, time.Now())
			require.Equal(t, update, d.verb)
			s.repaired(s.key, d)
		}

		s.there(c, at("6"))
		require.Zero(t, s.decide(s.key, time.Now()), "whatever the change is")
		s.mirrorOf(t, "pull")
		require.Zero(t, s.decide(s.key, time.Now()), "also a deletion")
		<-time.After(2*repairMaxDelay + 1)
		require.Equal(t, create, s.decide(s.key, time.Now()).verb)
		require.Zero(t, s.decide(s.key, time.Now()).repairs.times, "it was quiet for long: all is forgotten")
	})
}

func TestWhatIsNoRepairDoesNotWait(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(c)
		s.decides()
		s.there(c, edited)
		for range promptRepairs {
			s.repaired(s.key, s.decides())
		}
		require.Zero(t, s.decides())

		second := s.claimOf(t, resource(t, "b", 1, byName), 1)
		require.Equal(t, update, s.decides().verb, "another resource claims it, too")
		delete(s.byTarget["pull"], second.ref.UID)
		require.Zero(t, s.decides())

		c.setRendered(renderedAt(t, resource(t, "a", 0, byName), 8), c.selection)
		d := s.decides()
		require.Equal(t, update, d.verb, "a rotation")
		require.Nil(t, d.repairs)
	})
}

func TestThatTheServerIsTooBusyIsNoFailure(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.claimOf(t, resource(t, "a", 0, byName), 7)
		d := s.decides()
		s.conclude(s.key, d, apierrors.NewTooManyRequests("x", 1))
		require.Equal(t, map[string]string{"a in n": "pending at 0"}, s.outcomes())
		s.conclude(s.key, d, errors.New("x"))
		require.Equal(t, map[string]string{"a in n": "failed at 0"}, s.outcomes())
	})
}

// Also where the API server changes every write at once, as a mutating webhook does.
func TestWhatNeverStaysAsItWasWrittenIsARepair(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byName), 7)
		s.there(c, edited)
		d := s.decides()
		s.conclude(s.key, d, errAgain)
		s.noteDelivered(s.key, d)
		require.Equal(t, map[string]string{"a in n": "failed at 7"}, s.outcomes())
		for range promptRepairs {
			d := s.decides()
			require.NotNil(t, d.repairs)
			s.repaired(s.key, d)
		}
		require.Zero(t, s.decides(), "the next one waits")
	})
}
