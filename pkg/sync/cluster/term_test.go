package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/client-go/util/workqueue"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestReportOf(t *testing.T) {
	t.Parallel()
	report := func(name, text string) reportObject {
		return reportOf(&corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u", ResourceVersion: "5"}, Data: map[string]string{impsync.ReportKey: text},
		})
	}
	good := report("imps-node-n1", `{"node":"n1","formatVersions":[1],"demand":{"a":["u"]}}`)
	require.NoError(t, good.err)
	require.Equal(t, []int{1}, good.formats)
	require.Equal(t, demandsFrom("a u"), good.demand)
	require.Equal(t, types.UID("u"), good.uid)
	require.Equal(t, "5", good.resourceVersion)
	require.ErrorContains(t, report("imps-node-n2", `{"node":"n1"}`).err, "another node", "nobody speaks for another node")
	require.Error(t, report("imps-node-n1", `{`).err)
	require.Equal(t, types.UID("u"), report("imps-node-n1", `{`).uid)
}

func TestRenderedOf(t *testing.T) {
	t.Parallel()
	rendered := renderedAt(t, resource(t, "a", 0, byName), 7)
	data, err := impsync.EncodeRendered(rendered)
	require.NoError(t, err)
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: impsync.RenderedName("uid-a"), ResourceVersion: "5"}, Type: impsync.RenderedType, Data: data}
	renderedOf := newTestTerm(t).renderedOf
	got := renderedOf(s)
	require.NoError(t, got.err)
	require.Equal(t, "5", got.resourceVersion)
	require.True(t, sameRendered(rendered, got.rendered))
	s.Name = "other"
	require.Error(t, renderedOf(s).err)
}

func TestNamespaceMetaIsComparedByWhatDecides(t *testing.T) {
	t.Parallel()
	a := namespaceMeta{labels: map[string]string{"l": "1"}, annotations: map[string]string{"a": "1"}}
	require.True(t, a.equal(namespaceMeta{labels: map[string]string{"l": "1"}, annotations: map[string]string{"a": "1"}}))
	require.False(t, a.equal(namespaceMeta{labels: map[string]string{"l": "1"}}))
	require.False(t, a.equal(namespaceMeta{annotations: a.annotations}))
	require.False(t, a.equal(namespaceMeta{labels: a.labels, annotations: a.annotations, terminating: true}))
	require.True(t, namespaceMeta{}.equal(namespaceMeta{labels: map[string]string{}}))
}

func TestAnItemThatFailedComesBackWhenItsErrorSays(t *testing.T) {
	t.Parallel()
	secrets := corev1.Resource("secrets")
	const never = time.Duration(-1)
	tests := map[string]struct {
		err error
		// times is after how long it comes back at its first, second and third failure.
		times [3]time.Duration
	}{
		"passing":                               {errors.New("connection refused"), [3]time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}},
		"a conflict":                            {apierrors.NewConflict(secrets, "x", errors.New("x")), [3]time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}},
		"the server is busy, and says how long": {apierrors.NewTooManyRequests("x", 7), [3]time.Duration{7 * time.Second, 7 * time.Second, 7 * time.Second}},
		"the server suggests not to wait":       {apierrors.NewServerTimeout(secrets, "x", 0), [3]time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}},
		"refused":                               {apierrors.NewForbidden(secrets, "x", errors.New("x")), [3]time.Duration{time.Second, 2 * time.Second, 4 * time.Second}},
		"invalid":                               {apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Secret").GroupKind(), "x", nil), [3]time.Duration{impsync.RecheckInterval, impsync.RecheckInterval, impsync.RecheckInterval}},
		"gone":                                  {apierrors.NewNotFound(secrets, "x"), [3]time.Duration{never, never, never}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				refused := refusals()
				for _, want := range test.times {
					comeBack(s.targetQueue, refused, s.key, test.err)
					if want == never {
						<-time.After(24 * time.Hour)
						synctest.Wait()
						require.Empty(t, s.queuedTargets())
						continue
					}
					<-time.After(want - 1)
					synctest.Wait()
					require.Empty(t, s.queuedTargets())
					<-time.After(1)
					synctest.Wait()
					require.Equal(t, []string{"n/pull"}, s.queuedTargets())
				}
			})
		})
	}
}

func TestAnItemNeverWaitsLongerThanAMinuteForAnotherTry(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		for range 50 {
			comeBack(s.targetQueue, refusals(), s.key, errors.New("x"))
			<-time.After(time.Minute)
			synctest.Wait()
			require.Equal(t, []string{"n/pull"}, s.queuedTargets())
		}
	})
}

func TestWhatIsRefusedIsLookedAtEverMoreSeldom(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		refused, refusal := refusals(), apierrors.NewForbidden(corev1.Resource("secrets"), "x", errors.New("x"))
		for range 20 {
			comeBack(s.targetQueue, refused, s.key, refusal)
			<-time.After(impsync.RecheckInterval)
			synctest.Wait()
			require.Equal(t, []string{"n/pull"}, s.queuedTargets())
		}
		comeBack(s.targetQueue, refused, s.key, refusal)
		<-time.After(impsync.RecheckInterval - 1)
		synctest.Wait()
		require.Empty(t, s.queuedTargets())
	})
}

func refusals() workqueue.TypedRateLimiter[targetKey] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[targetKey](impsync.RecheckSoonest, impsync.RecheckInterval)
}

// Else each of ten thousand items would be sent to a server that is too busy for one.
func TestAWorkerRestsWhereTheServerIsTooBusy(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		for i := range 10 {
			s.targetQueue.Add(targetKey{"n", strconv.Itoa(i)})
		}
		start, tries := time.Now(), 0
		ctx, cancel := context.WithCancel(t.Context())
		busy := func(context.Context, targetKey) error {
			tries++
			return apierrors.NewTooManyRequests("x", 30)
		}
		done := make(chan error)
		go func() { done <- workersOf(ctx, s.term, 1, "x", s.targetQueue, busy)[0](ctx) }()
		<-time.After(5*impsync.ThrottlePause + 1)
		synctest.Wait()
		require.Equal(t, 6, tries, "one a second, not all at once")
		cancel()
		s.targetQueue.ShutDown()
		require.NoError(t, <-done)
		require.Equal(t, 5*impsync.ThrottlePause+1, time.Since(start), "the end does not wait")
	})
}

func TestAResourceThatNobodyHasSeenGoIsAskedForBeforeItIsRetired(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		require.Error(t, s.reconcileResource(t.Context(), "uid-new"), "the server is away")
		require.Equal(t, []string{listOfResources}, s.server().asked(), "nothing is deleted")
		require.NotContains(t, s.gone, types.UID("uid-new"))
		s.gone["uid-old"] = false
		require.Error(t, s.reconcileResource(t.Context(), "uid-old"))
		require.NotContains(t, s.server().asked(), listOfResources, "its end was seen")
	})
}

func TestWorkers(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		var log bytes.Buffer
		s.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		var stopped error
		s.stop = func(err error) { stopped = err }
		secrets := corev1.Resource("secrets")
		errs := map[string]error{
			"good":       nil,
			"refused":    apierrors.NewForbidden(secrets, "x", errors.New("no")),
			"invalid":    apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Secret").GroupKind(), "x", field.ErrorList{field.Invalid(field.NewPath("data"), canary, "x")}),
			"conflict":   fmt.Errorf("x: %w", errAgain),
			"gone":       apierrors.NewNotFound(secrets, "x"),
			"superseded": fmt.Errorf("x: %w", errSuperseded),
		}
		seen := make(chan string, 100)
		tasks := workersOf(t.Context(), s.term, 3, "target Secret", s.targetQueue, func(_ context.Context, key targetKey) error {
			seen <- key.name
			return errs[key.name]
		})
		require.Len(t, tasks, 3)
		done := make(chan error)
		go func() { done <- impsync.RunTasks(t.Context(), tasks...) }()
		for name := range errs {
			s.enqueueTarget(targetKey{"n", name})
		}
		<-time.After(50 * time.Millisecond)
		synctest.Wait()
		require.Len(t, seen, len(errs))
		require.ErrorIs(t, stopped, errSuperseded, "the term ends")
		<-time.After(time.Second)
		synctest.Wait()
		require.Greater(t, len(seen), len(errs), "what may pass is tried again")
		s.targetQueue.ShutDown()
		require.NoError(t, <-done, "the end of the queue is the end of its workers")

		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		count := func(parts ...string) (n int) {
			for _, line := range lines {
				all := true
				for _, part := range parts {
					all = all && strings.Contains(line, part)
				}
				if all {
					n++
				}
			}
			return n
		}
		require.Equal(t, 1, count("level=WARN", "item=n/refused", "class=refused"))
		require.Equal(t, 1, count("level=WARN", "item=n/invalid", "class=invalid"))
		require.Equal(t, 1, count("level=DEBUG", "item=n/gone", "class=gone"))
		require.Zero(t, count("item=n/good"))
		require.Zero(t, count("item=n/superseded"))
		requireSilent(t, log.String())
	})
}

func TestWhatIsInTheQueueAtTheEndStaysUndone(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		begun := 0
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s.enqueueTarget(s.key)
		s.targetQueue.ShutDown()
		tasks := workersOf(t.Context(), s.term, 1, "x", s.targetQueue, func(context.Context, targetKey) error { begun++; return nil })
		require.NoError(t, impsync.RunTasks(ctx, tasks...))
		require.Zero(t, begun)
	})
}

func TestAfterTheEndNothingComesBack(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		done := make(chan error)
		go func() {
			done <- impsync.RunTasks(t.Context(), workersOf(ctx, s.term, 1, "x", s.targetQueue, func(ctx context.Context, _ targetKey) error { return ctx.Err() })...)
		}()
		s.enqueueTarget(s.key)
		<-time.After(time.Hour)
		require.Empty(t, s.queuedTargets())
		s.targetQueue.ShutDown()
		require.NoError(t, <-done)
	})
}

// knows has the term's first lists be these.
func (s *situation) knows(resources []*v1alpha1.ImagePullSecret, rendered []corev1.Secret, reports []corev1.ConfigMap, nodes ...string) {
	s.t.Helper()
	s.started = false
	images := &v1alpha1.ImagePullSecretList{}
	for _, r := range resources {
		images.Items = append(images.Items, *r)
	}
	s.resources = synced(s.t, impsync.MirrorConfig[*v1alpha1.ImagePullSecret]{
		Name: "resources", Example: &v1alpha1.ImagePullSecret{}, Log: s.log, OnChange: s.resourceChanged,
		Convert: func(o runtime.Object) *v1alpha1.ImagePullSecret { return o.(*v1alpha1.ImagePullSecret) },
	}, images)
	s.rendered = synced(s.t, impsync.MirrorConfig[renderedSecret]{
		Name: "rendered", Example: &corev1.Secret{}, Log: s.log, OnChange: s.renderedChanged,
		Convert: func(o runtime.Object) renderedSecret { return s.renderedOf(o.(*corev1.Secret)) },
	}, &corev1.SecretList{Items: rendered})
	s.reports = synced(s.t, impsync.MirrorConfig[reportObject]{
		Name: "reports", Example: &corev1.ConfigMap{}, Log: s.log, OnChange: s.reportChanged,
		Convert: func(o runtime.Object) reportObject { return reportOf(o.(*corev1.ConfigMap)) },
	}, &corev1.ConfigMapList{Items: reports})
	list := &metav1.PartialObjectMetadataList{}
	for _, node := range nodes {
		list.Items = append(list.Items, metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: node}})
	}
	s.nodes = synced(s.t, impsync.MirrorConfig[struct{}]{
		Name: "nodes", Example: &metav1.PartialObjectMetadata{}, Log: s.log, OnChange: s.nodeChanged,
		Convert: func(runtime.Object) struct{} { return struct{}{} },
	}, list)
	list = &metav1.PartialObjectMetadataList{Items: []metav1.PartialObjectMetadata{{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, {ObjectMeta: metav1.ObjectMeta{Name: "m"}}}}
	s.namespaces = synced(s.t, impsync.MirrorConfig[namespaceMeta]{
		Name: "namespaces", Example: &metav1.PartialObjectMetadata{}, Log: s.log, OnChange: s.namespaceChanged,
		Convert: func(runtime.Object) namespaceMeta { return namespaceMeta{} },
	}, list)
	s.queuedResources()
	s.queuedTargets()
}

// renderedSecretOf is the rendered Secret of a resource.
func renderedSecretOf(t *testing.T, r *v1alpha1.ImagePullSecret, counter uint64) corev1.Secret {
	t.Helper()
	data, err := impsync.EncodeRendered(renderedAt(t, r, counter))
	require.NoError(t, err)
	return corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "imps-rendered", Name: impsync.RenderedName(r.UID), ResourceVersion: "1"}, Type: impsync.RenderedType, Data: data}
}

func TestATermBeginsWithWhatWasRenderedBefore(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		a, fresh, going := resource(t, "a", 0, byName), resource(t, "fresh", 1, byName), resource(t, "going", 2, byName)
		when := metav1.Now()
		going.DeletionTimestamp, going.Finalizers = &when, []string{"x/y"}
		dead := resource(t, "dead", 0, byName)
		spoilt := renderedSecretOf(t, resource(t, "spoilt", 0, byName), 3)
		spoilt.Data = nil
		report := func(node, text string) corev1.ConfigMap {
			return corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "imps-system", Name: impsync.ReportName(node)}, Data: map[string]string{impsync.ReportKey: text}}
		}
		s.knows([]*v1alpha1.ImagePullSecret{a, fresh, going},
			[]corev1.Secret{renderedSecretOf(t, a, 7), renderedSecretOf(t, going, 2), renderedSecretOf(t, dead, 5), spoilt},
			[]corev1.ConfigMap{report("n1", `{"node":"n1","demand":{"m":["uid-a"]}}`), report("gone", `{"node":"gone"}`), report("n2", `{`)},
			"n1", "n2", "n3")
		s.mirrorOf(t, "pull", applied(t, "old", renderedAt(t, a, 7).Target))
		s.mirrorOf(t, "other")

		require.True(t, s.begin(t.Context()))
		require.True(t, s.hasStarted())
		require.ElementsMatch(t, []types.UID{"uid-a", "uid-fresh"}, keys(s.claims))
		require.Equal(t, uint64(7), s.claims["uid-a"].rendered.Target.Revision().Counter)
		require.True(t, s.claims["uid-fresh"].rendered.Target.IsZero())
		require.Equal(t, []string{"uid-a", "uid-dead", "uid-fresh", "uid-going", "uid-spoilt"}, s.queuedResources(), "also what was rendered of a resource that is gone, readable or not")
		require.Equal(t, []string{"m/pull", "n/pull", "old/pull"}, s.queuedTargets())
		require.Equal(t, 1, s.demand.states[demandKey{"m", "uid-a"}].nodes)
		require.InDelta(t, 2, gaugesOf(t, s.config.Registry.(gatherer))["imps_nodes_without_agent{}"], 0, "n3, and n2, whose report cannot be read")
		<-time.After(DefaultReportLinger + 1)
		synctest.Wait()
		require.Equal(t, []string{"gone"}, drain(s.reportQueue, func(s string) string { return s }))
	})
}

func TestATermThatEndsBeforeItsFirstListsDoesNotBegin(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s.started = false
		require.False(t, s.begin(ctx), "nothing is judged by half of what is known")

		require.False(t, s.started)
	})
}

func TestATermWithoutAServerEndsWhenItIsTold(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.run(ctx) }()
		<-time.After(10 * time.Minute)
		require.NotEmpty(t, s.server().asked())
		require.False(t, s.Leading())
		start := time.Now()
		cancel()
		require.NoError(t, <-done)
		require.Less(t, time.Since(start), impsync.Grace)
		synctest.Wait()
		require.Empty(t, s.server().asked())
	})
}

func TestATermThatIsSupersededSaysSo(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		done := make(chan error)
		go func() { done <- s.run(t.Context()) }()
		<-time.After(time.Second)
		synctest.Wait()
		s.stop(fmt.Errorf("x: %w", errSuperseded))
		require.ErrorIs(t, <-done, errSuperseded)
	})
}
