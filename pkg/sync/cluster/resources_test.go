package cluster

import (
	"errors"
	"strings"
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

func TestResourceChanged(t *testing.T) {
	t.Parallel()
	edit := func(edit func(r *v1alpha1.ImagePullSecret)) *v1alpha1.ImagePullSecret {
		r := resource(t, "a", 0, byName)
		edit(r)
		return r
	}
	same := func(*v1alpha1.ImagePullSecret) {}
	deleting := func(finalizers ...string) func(*v1alpha1.ImagePullSecret) {
		return func(r *v1alpha1.ImagePullSecret) {
			when := metav1.NewTime(noon)
			r.DeletionTimestamp, r.Finalizers = &when, finalizers
		}
	}
	again := func(r *v1alpha1.ImagePullSecret) { r.UID = "uid-again" }
	tests := map[string]struct {
		old, current func(*v1alpha1.ImagePullSecret)
		queued       []string // the resources that are looked at
		byUID        []types.UID
		gone         map[types.UID]bool
	}{
		"new":                     {nil, same, []string{"uid-a"}, []types.UID{"uid-a"}, nil},
		"the same":                {same, same, nil, []types.UID{"uid-a"}, nil},
		"its status has changed":  {same, func(r *v1alpha1.ImagePullSecret) { r.Status.Status = "Ready"; r.ResourceVersion = "2" }, nil, []types.UID{"uid-a"}, nil},
		"its labels have changed": {same, func(r *v1alpha1.ImagePullSecret) { r.Labels = map[string]string{"l": "1"} }, nil, []types.UID{"uid-a"}, nil},
		"its spec has changed":    {same, func(r *v1alpha1.ImagePullSecret) { r.Generation = 2 }, []string{"uid-a"}, []types.UID{"uid-a"}, nil},
		"it is going":             {same, deleting("x/y"), []string{"uid-a"}, []types.UID{"uid-a"}, nil},
		"it is going, its Secrets first": {
			same, deleting(metav1.FinalizerDeleteDependents), []string{"uid-a"}, []types.UID{"uid-a"}, map[types.UID]bool{"uid-a": false},
		},
		"it is going, its Secrets stay":     {same, deleting(metav1.FinalizerOrphanDependents), []string{"uid-a"}, []types.UID{"uid-a"}, nil},
		"a finalizer has gone":              {deleting("x/y", "x/z"), deleting("x/z"), []string{"uid-a"}, []types.UID{"uid-a"}, nil},
		"it is gone":                        {same, nil, []string{"uid-a"}, nil, map[types.UID]bool{"uid-a": false}},
		"it is gone, its Secrets stay":      {deleting(metav1.FinalizerOrphanDependents), nil, []string{"uid-a"}, nil, map[types.UID]bool{"uid-a": true}},
		"it is gone after a finalizer":      {deleting("x/y"), nil, []string{"uid-a"}, nil, map[types.UID]bool{"uid-a": false}},
		"another of the name":               {same, again, []string{"uid-a", "uid-again"}, []types.UID{"uid-again"}, map[types.UID]bool{"uid-a": false}},
		"another of the name, after orphan": {deleting(metav1.FinalizerOrphanDependents), again, []string{"uid-a", "uid-again"}, []types.UID{"uid-again"}, map[types.UID]bool{"uid-a": true}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				term := newTestTerm(t)
				var old, current **v1alpha1.ImagePullSecret
				if test.old != nil {
					r := edit(test.old)
					old = &r
					term.byUID[r.UID] = r
				}
				if test.current != nil {
					r := edit(test.current)
					current = &r
				}
				term.resourceChanged(types.NamespacedName{Name: "a"}, old, current)
				require.Equal(t, test.queued, term.queuedResources())
				<-time.After(2 * statusDelay)
				synctest.Wait()
				require.Equal(t, test.queued == nil, len(term.queuedStatuses()) == 1, "else only its status is")
				require.Len(t, term.byUID, len(test.byUID))
				for _, uid := range test.byUID {
					require.Same(t, *current, term.byUID[uid])
				}
				if test.gone == nil {
					test.gone = map[types.UID]bool{}
				}
				require.Equal(t, test.gone, term.gone)
			})
		})
	}
}

func TestAResourceComesIntoForceAsItWasRendered(t *testing.T) {
	t.Parallel()
	r := resource(t, "a", 0, byName)
	was := resource(t, "a", 0, byPods)

	c := newClaim(r, impsync.Rendered{})
	require.Equal(t, impsync.RefOf(r), c.ref)
	require.True(t, c.rendered.Target.IsZero(), "never rendered: it selects nothing")
	require.Nil(t, c.selection)
	require.True(t, c.unread)

	c = newClaim(r, renderedAt(t, was, 7))
	require.Equal(t, uint64(7), c.rendered.Target.Revision().Counter)
	require.True(t, c.selection.HasPodRules(), "as it was rendered, not as its spec is by now")
	require.False(t, c.selection.SelectsByRule("n", nil, nil))

	unusable := renderedAt(t, was, 7)
	unusable.Namespaces.Labels = []metav1.LabelSelector{{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Foo"}}}}
	require.True(t, newClaim(r, unusable).rendered.Target.IsZero(), "what cannot be evaluated selects nothing")
}

func TestValidate(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		target  string
		problem string
		skipped int
	}{
		"as it should be":   {byName, "", 0},
		"no selectors (K1)": {byNone, "", 0},
		"no spec (K1)":      {`{}`, "", 0},
		"an empty name, and nothing selected (K1)": {`{secret: {name: ""}, namespaces: {names: []}}`, "", 0},
		"an empty name":               {`{secret: {name: ""}, namespaces: {names: [a]}}`, "spec.target.secret.name is empty", 0},
		"an empty name and Pod rules": {`{secret: {name: ""}, namespacesWithPods: {labels: [{}]}}`, "spec.target.secret.name is empty", 0},
		"a name that is not allowed":  {`{secret: {name: mine}}`, `"mine" is not in --target-secret-names (pull, other): add it to the chart's value targetSecretNames`, 0},
		"a bad namespace selector":    {`{secret: {name: pull}, namespaces: {labels: [{matchExpressions: [{key: a, operator: Foo}]}]}}`, "spec.target.namespaces.labels[0]", 0},
		"a bad Pod selector":          {`{secret: {name: pull}, namespacesWithPods: {labels: [{matchExpressions: [{key: a, operator: Foo}]}, {}]}}`, "", 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				selection, skipped, problem := newTestTerm(t).validate(resource(t, "a", 0, test.target))
				if test.problem != "" {
					require.ErrorContains(t, problem, test.problem)
					return
				}
				require.NoError(t, problem)
				require.NotNil(t, selection)
				require.Len(t, skipped, test.skipped)
			})
		})
	}
}

func TestWhatAResourceThatHasNothingToDeliverLeftIsLookedAt(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		s.there(s.claimOf(t, r, 7))
		s.claims, s.byTarget = map[types.UID]*claim{}, map[string]map[types.UID]*claim{}
		c := newClaim(r, impsync.Rendered{}) // a new term, and its rendered Secret is gone
		c.state = &state{}
		s.putClaim(c)
		r.Spec.Registry.Credentials = []v1alpha1.CredentialSource{{Name: "hub", Namespace: "not-allowed"}}
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		require.True(t, c.rendered.Target.IsZero())
		require.Equal(t, []string{"n/pull"}, s.queuedTargets())
		require.NoError(t, s.reconcileResource(t.Context(), r.UID))
		require.Empty(t, s.queuedTargets(), "once")
	})
}

func TestPutClaimMovesAClaimToItsNewName(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := resource(t, "a", 0, byName)
		c := s.claimOf(t, r, 1)
		s.mirrorOf(t, "other")
		s.putClaim(c)
		require.Same(t, c, s.byTarget["pull"]["uid-a"])
		c.setRendered(renderedAt(t, resource(t, "a", 0, `{secret: {name: other}}`), 2), c.selection)
		s.putClaim(c)
		require.Empty(t, s.byTarget["pull"])
		require.Same(t, c, s.byTarget["other"]["uid-a"])
		require.Same(t, c, s.claims["uid-a"])
		unrendered := newClaim(resource(t, "b", 0, byName), impsync.Rendered{})
		s.putClaim(unrendered)
		require.Same(t, unrendered, s.claims["uid-b"])
		require.Empty(t, s.byTarget["pull"])
	})
}

func TestTheHighestCounterIsThatOfAnyTarget(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r, other := resource(t, "a", 0, byName), resource(t, "b", 0, byName)
		renamed := resource(t, "a", 0, `{secret: {name: other}}`)
		edited := applied(t, "z", renderedAt(t, r, 99).Target)
		edited.ManagedFields[0].FieldsV1.SetRawString(`{"f:type":{}}`)
		s.mirrorOf(t, "pull", applied(t, "x", renderedAt(t, r, 3).Target), applied(t, "y", renderedAt(t, other, 50).Target), edited)
		s.mirrorOf(t, "other", applied(t, "x", renderedAt(t, renamed, 12).Target))
		require.Equal(t, uint64(12), s.highestCounter("uid-a"))
		require.Equal(t, uint64(50), s.highestCounter("uid-b"))
		require.Zero(t, s.highestCounter("uid-c"))
	})
}

func TestSameRendered(t *testing.T) {
	t.Parallel()
	r := resource(t, "a", 0, byName)
	a := renderedAt(t, r, 7)
	require.True(t, sameRendered(a, renderedAt(t, r, 7)))
	require.False(t, sameRendered(a, renderedAt(t, r, 8)))
	require.False(t, sameRendered(a, renderedAt(t, resource(t, "a", 0, byPods), 7)))
	require.False(t, sameRendered(a, renderedAt(t, resource(t, "a", 0, `{secret: {name: pull}, namespaces: {names: ["n", kube-n]}}`), 7)))
	younger := renderedAt(t, r, 7)
	younger.Resource.Name = "b"
	require.False(t, sameRendered(a, younger))
}

func TestRenderedChangedHasItsResourceLookedAt(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		a, b := resource(t, "a", 0, byName), resource(t, "b", 0, byName)
		s.claimOf(t, b, 1)
		good := &renderedSecret{rendered: renderedAt(t, a, 1)}
		bad := &renderedSecret{err: errors.New("x")}
		key := func(uid types.UID) types.NamespacedName {
			return types.NamespacedName{Namespace: "imps-rendered", Name: impsync.RenderedName(uid)}
		}
		for name, test := range map[string]struct {
			key          types.NamespacedName
			old, current *renderedSecret
			want         []string
		}{
			"new, of nobody in force":       {key("uid-a"), nil, good, []string{"uid-a"}},
			"gone":                          {key("uid-a"), good, nil, []string{"uid-a"}},
			"spoilt":                        {key("uid-a"), good, bad, []string{"uid-a"}},
			"spoilt from the start":         {key("uid-a"), nil, bad, nil},
			"spoilt, of a claim in force":   {key("uid-b"), bad, bad, []string{"uid-b"}},
			"spoilt and gone, of a claim":   {key("uid-b"), bad, nil, []string{"uid-b"}},
			"something else in its place":   {key("uid-b"), good, bad, []string{"uid-a", "uid-b"}},
			"a Secret that nobody knows of": {types.NamespacedName{Name: "x"}, nil, bad, nil},
		} {
			s.renderedChanged(test.key, test.old, test.current)
			require.Equal(t, test.want, s.queuedResources(), name)
		}
	})
}

func TestPublishedIsWhatCanBeRead(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		_, there := s.published("uid-a")
		require.False(t, there)
		s.rendered.Put(s.renderedKey("uid-a"), renderedSecret{rendered: renderedAt(t, resource(t, "a", 0, byName), 7), resourceVersion: "1"})
		r, there := s.published("uid-a")
		require.True(t, there)
		require.Equal(t, uint64(7), r.Target.Revision().Counter)
		s.rendered.Put(s.renderedKey("uid-a"), renderedSecret{err: errors.New("x"), resourceVersion: "2"})
		r, there = s.published("uid-a")
		require.False(t, there)
		require.True(t, r.Target.IsZero())
	})
}

// rendering is one call of renderAndPublish for the resource "a". Its server is away, so
// that every write is a failure.
type rendering struct {
	*situation
	resource *v1alpha1.ImagePullSecret
	claim    *claim
	known    *state
	resolved resolution
}

func newRendering(t *testing.T, s *situation, registries ...string) *rendering {
	t.Helper()
	r := &rendering{situation: s, resource: resource(t, "a", 0, byName), known: &state{}}
	r.claim = newClaim(r.resource, impsync.Rendered{})
	s.claims["uid-a"], s.byUID["uid-a"] = r.claim, r.resource
	r.resolved = resolve([]credential{{key: "ns.a", given: given{config: configOf(t, registries...)}}}, &state{}, noon)
	return r
}

func (r *rendering) render() (problem, failure error) {
	selection, _, err := r.validate(r.resource)
	require.NoError(r.t, err)
	return r.renderAndPublish(r.t.Context(), r.resource, r.claim, r.known, r.resolved, selection)
}

// remembers has state and rendered Secret say what they would be after a render at a counter.
func (r *rendering) remembers(counter uint64) impsync.Rendered {
	r.t.Helper()
	config, err := r.resolved.config.Render()
	require.NoError(r.t, err)
	target, err := impsync.NewTarget(r.claim.ref, r.resource.Spec.Target.Secret, counter, config)
	require.NoError(r.t, err)
	rendered := impsync.Rendered{FormatVersion: 1, Resource: r.claim.ref, Namespaces: r.resource.Spec.Target.Namespaces, Pods: r.resource.Spec.Target.NamespacesWithPods, Target: target}
	r.known = &state{counter: counter, lastGood: r.resolved.lastGood, resourceVersion: "5"}
	r.rendered.Put(r.renderedKey("uid-a"), renderedSecret{rendered: rendered, resourceVersion: "1"})
	return rendered
}

func TestWithoutANameOrCredentialsNothingIsRendered(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := newRendering(t, s, "r.io=1")
		r.resource.Spec.Target = v1alpha1.TargetSpec{}
		problem, failure := r.render()
		require.NoError(t, problem)
		require.NoError(t, failure)
		require.True(t, r.claim.withdrawn)

		r = newRendering(t, s)
		r.resolved = resolve([]credential{{key: "ns.a", err: errors.New("not found"), withdrawn: true}}, &state{}, noon)
		problem, failure = r.render()
		require.NoError(t, problem)
		require.NoError(t, failure)
		require.True(t, r.claim.rendered.Target.IsZero())
		require.False(t, r.claim.withdrawn)
		require.Empty(t, s.server().asked())
	})
}

func TestAResourceThatAsksForNothingAnyMoreIsWithdrawn(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := newRendering(t, s, "r.io=1")
		r.claim.setRendered(r.remembers(7), nil)
		r.claim.outcomes["n"] = outcome{kind: delivered, counter: 7}
		s.putClaim(r.claim)
		spec := r.resource.Spec.Target
		r.resource.Spec.Target = v1alpha1.TargetSpec{}
		_, failure := r.render()
		require.Error(t, failure)
		require.Equal(t, []string{"DELETE /api/v1/namespaces/imps-rendered/secrets/imps-rendered-uid-a"}, s.server().asked(), "first of all, so that no agent creates anything more")
		require.False(t, r.claim.withdrawn, "not before that is done")
		require.NotEmpty(t, s.byTarget["pull"])

		r.rendered.Drop(r.renderedKey("uid-a"), func(renderedSecret) bool { return true })
		_, failure = r.render()
		require.NoError(t, failure)
		require.True(t, r.claim.withdrawn)
		require.Empty(t, s.byTarget["pull"])
		require.Empty(t, r.claim.outcomes)

		// And when it asks for something again, it is as before.
		r.resource.Spec.Target = spec
		r.claim.setRendered(r.remembers(8), nil)
		require.False(t, r.claim.withdrawn)
	})
}

// State and rendered Secret go with their resource, and its end may be told of last.
func TestWhatWasThereIsNotWrittenAnewWithoutAWordOfItsResource(t *testing.T) {
	const owner = "GET /apis/images.banzaicloud.io/v1alpha1/imagepullsecrets/a"
	inBubble(t, func(t *testing.T, s *situation) {
		r := newRendering(t, s, "r.io=1")
		_, failure := r.render()
		require.Error(t, failure)
		require.Equal(t, []string{"POST /api/v1/namespaces/imps-system/secrets"}, s.server().asked(), "the first time nobody is asked")

		r.claim.setRendered(r.remembers(7), nil)
		r.resolved = resolve([]credential{{key: "ns.a", given: given{config: configOf(t, "r.io=2")}}}, &state{}, noon)
		_, failure = r.render()
		require.Equal(t, impsync.ClassRetry, impsync.ClassifyError(failure))
		require.Equal(t, []string{owner}, s.server().asked())
		s.server().refusal = apierrors.NewNotFound(v1alpha1.Resource.GroupResource(), "a")
		_, failure = r.render()
		require.Equal(t, impsync.ClassGone, impsync.ClassifyError(failure))
		require.Equal(t, []string{owner}, s.server().asked())
	})
}

// The state Secret is lost, and a source fails: what it gave is only in the rendered Secret.
func TestWhatCannotBeMergedAnewStaysAsItWasRendered(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := newRendering(t, s, "r.io=1")
		before := r.remembers(7)
		before.Namespaces = v1alpha1.NamespaceSelector{}
		r.claim.setRendered(before, nil)
		r.resolved = resolve([]credential{{key: "ns.a", given: given{config: configOf(t, "r.io=2")}}, {key: "ns.b", err: errors.New("x")}}, &state{}, noon)
		// Where the state is complete, that source has never given anything: the rest is merged.
		r.known = &state{uid: "uid-state", resourceVersion: "1"}
		_, failure := r.render()
		require.ErrorContains(t, failure, "imps-state-uid-a")

		// Where it is not, the credentials stay, and the selectors follow all the same.
		s.server().asked()
		r.known = &state{incomplete: true, uid: "uid-state", resourceVersion: "1"}
		_, failure = r.render()
		require.ErrorContains(t, failure, "imps-state-uid-a", "the state is written anew")
		require.Equal(t, []string{"PATCH /api/v1/namespaces/imps-system/secrets/imps-state-uid-a"}, s.server().asked())
		require.Equal(t, uint64(7), r.claim.rendered.Target.Revision().Counter)
	})
}

func TestCredentialsThatAreTooLargeAreAProblemOfTheResource(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		resolved func(t *testing.T) resolution
	}{
		"merged": {func(t *testing.T) resolution {
			t.Helper()
			return resolve([]credential{{key: "ns.a", given: given{config: configOf(t, "r.io="+canary+strings.Repeat("x", corev1.MaxSecretSize))}}}, &state{}, noon)
		}},
		"of all sources together": {func(t *testing.T) resolution {
			t.Helper()
			config := configOf(t, "r.io="+canary+noise(corev1.MaxSecretSize/4))
			return resolve([]credential{{key: "ns.a", given: given{config: config}}, {key: "ns.b", given: given{config: config}}}, &state{}, noon)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				r := newRendering(t, s)
				r.resolved = test.resolved(t)
				problem, failure := r.render()
				require.NoError(t, failure)
				require.ErrorContains(t, problem, "too large")
				requireSilent(t, problem.Error())
				require.True(t, r.claim.rendered.Target.IsZero(), "what was in force stays")
			})
		})
	}
}

func TestAWriteThatFailsIsAFailureAndChangesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := newRendering(t, s, "r.io="+canary)
		problem, failure := r.render()
		require.NoError(t, problem)
		require.ErrorContains(t, failure, "write Secret imps-system/imps-state-uid-a")
		require.Equal(t, []string{"POST /api/v1/namespaces/imps-system/secrets"}, s.server().asked(), "the counter goes first, and only over what was read")
		requireSilent(t, failure.Error())
		require.True(t, r.claim.rendered.Target.IsZero())

		// The state says so already, the rendered Secret does not.
		r.known = &state{counter: 1, lastGood: r.resolved.lastGood, resourceVersion: "5"}
		r.claim.state = r.known
		problem, failure = r.render()
		require.NoError(t, problem)
		require.ErrorContains(t, failure, "imps-state-uid-a", "a lost rendered Secret is a new content")
		require.Equal(t, []string{"PATCH /api/v1/namespaces/imps-system/secrets/imps-state-uid-a"}, s.server().asked())
		require.Nil(t, r.claim.state, "whatever is there, it is read again")
	})
}

// Where our own namespace is missing nothing is "gone", so that the resource comes back.
func TestAMissingNamespaceOfOurOwnIsAFailureThatPasses(t *testing.T) {
	t.Parallel()
	missing := apierrors.NewNotFound(corev1.Resource("namespaces"), "imps-rendered")
	going := apierrors.NewForbidden(corev1.Resource("secrets"), "x", errors.New("it is being terminated"))
	going.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
	for name, test := range map[string]struct {
		refusal *apierrors.StatusError
		want    impsync.ErrorClass
	}{
		"missing":    {missing, impsync.ClassRetry},
		"going":      {going, impsync.ClassRetry},
		"refused":    {apierrors.NewForbidden(corev1.Resource("secrets"), "x", errors.New("no")), impsync.ClassRetry},
		"it is busy": {apierrors.NewServiceUnavailable("x"), impsync.ClassRetry},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				s.server().refusal = test.refusal
				problem, failure := newRendering(t, s, "r.io="+canary).render()
				require.NoError(t, problem)
				require.ErrorContains(t, failure, "write Secret imps-system/imps-state-uid-a: ")
				require.Equal(t, test.want, impsync.ClassifyError(failure))
				requireSilent(t, failure.Error())
			})
		})
	}
}

func TestWhereAnotherHasWrittenTheStateTheLeaseIsAskedFor(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		known   *state
		refusal *apierrors.StatusError
		write   string
	}{
		"there was none":         {&state{}, apierrors.NewAlreadyExists(corev1.Resource("secrets"), "x"), "POST /api/v1/namespaces/imps-system/secrets"},
		"it was at that version": {&state{resourceVersion: "5"}, apierrors.NewConflict(corev1.Resource("secrets"), "x", errors.New("x")), "PATCH /api/v1/namespaces/imps-system/secrets/imps-state-uid-a"},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				s.server().refusal = test.refusal
				r := newRendering(t, s, "r.io=1")
				r.known = test.known
				problem, failure := r.render()
				require.NoError(t, problem)
				require.ErrorContains(t, failure, "read the Lease")
				require.Equal(t, []string{test.write, "GET /apis/coordination.k8s.io/v1/namespaces/imps-system/leases/" + LeaseName}, s.server().asked())
			})
		})
	}
}

func TestWhatIsRenderedAlreadyComesIntoForceWithoutAWrite(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		r := newRendering(t, s, "r.io=1")
		rendered := r.remembers(7)
		r.claim.setRendered(rendered, nil)
		problem, failure := r.render()
		require.NoError(t, problem)
		require.NoError(t, failure)
		require.Empty(t, s.server().asked(), "nothing is written")
		require.Equal(t, rendered.Target.Revision(), r.claim.rendered.Target.Revision())
		require.Empty(t, s.queuedTargets())
		require.Equal(t, uint64(7), r.claim.state.counter)
	})
}

func TestAChangedSelectionHasEveryNamespaceLookedAt(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		s.namespace("m", nil)
		r := newRendering(t, s, "r.io=1")
		before := r.remembers(7)
		before.Namespaces = v1alpha1.NamespaceSelector{Names: []string{"m"}}
		r.claim.setRendered(before, nil)
		s.putClaim(r.claim)
		problem, failure := r.render()
		require.NoError(t, problem)
		require.NoError(t, failure)
		require.Equal(t, []string{"m/pull", "n/pull"}, s.queuedTargets())
		require.Equal(t, []string{"n", "kube-n"}, r.claim.rendered.Namespaces.Names)
		require.True(t, r.claim.selection.SelectsByRule("n", nil, nil))
	})
}

func TestSensitiveInputsOfARenderArePrintedNowhere(t *testing.T) {
	t.Parallel()
	resolved := resolve([]credential{{key: "ns.a", given: given{config: configOf(t, "r.io="+canary)}}}, &state{lastGood: map[string]given{"ns.b": {config: configOf(t, "s.io="+canary)}}}, noon)
	c := newClaim(resource(t, "a", 0, byName), renderedAt(t, resource(t, "a", 0, byName), 1))
	c.state = &state{lastGood: resolved.lastGood}
	requireSilent(t, strings.Join([]string{sprintAll(resolved), sprintAll(c), sprintAll(*c.state), sprintAll(renderedSecret{rendered: c.rendered}), sprintAll(decision{target: c.rendered.Target})}, "\n"))
}

// It was rendered in an earlier term, but the first list of this one did not have it yet.
func TestAResourceThatIsHeardOfLateIsLookedAtEverywhere(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		target string
		verb   verb
	}{
		"it selects the namespace":                       {byName, create},
		"it holds a Secret that nobody wants any more":   {byNone, remove},
		"its Secret is there, and it wants it no longer": {byNone, remove},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				was := newRendering(t, s)
				was.resource = resource(t, "a", 0, test.target)
				was.resolved = resolve(nil, &state{}, noon)
				rendered := was.remembers(7)
				raw, err := encodeState(*was.known)
				require.NoError(t, err)
				delete(s.claims, "uid-a")
				delete(s.byUID, "uid-a")
				switch name {
				case "it selects the namespace":
				case "it holds a Secret that nobody wants any more":
					s.there(s.claimOf(t, resource(t, "o", 1, byNone), 3))
					s.refersTo("uid-a", "uid-o")
				default:
					s.mirrorOf(t, "pull", applied(t, "n", rendered.Target))
				}
				name := impsync.StateName("uid-a")
				s.server().answers = map[string]any{"GET /api/v1/namespaces/imps-system/secrets/" + name: corev1.Secret{
					TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
					ObjectMeta: metav1.ObjectMeta{Name: name, UID: "s", ResourceVersion: "5"},
					Data:       map[string][]byte{stateKey: raw},
				}}
				s.queuedTargets()
				s.resourceChanged(types.NamespacedName{Name: "a"}, nil, &was.resource)
				require.NoError(t, s.reconcileResource(t.Context(), "uid-a"))
				require.Equal(t, []string{"n/pull"}, s.queuedTargets())
				require.Equal(t, test.verb, s.decides().verb)
			})
		})
	}
}
