package integration

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	"github.com/imps-node/imps/test/cluster/cluster"
)

func allowRescue(c *clusterduty.Config) { c.AllowRescue = true }

// rescuing is a target that the ServiceAccount default of these namespaces names, and for whose sake Pods may be evicted.
func rescuing(namespaces string) string {
	return spec(`  namespaces: {names: [` + namespaces + `]}
  serviceAccounts: {names: [default]}
  rescue: true`)
}

// deploy creates a Deployment whose Pods are bound to node-a, and returns them.
func (s *system) deploy(namespace string, replicas int, change ...func(*corev1.PodSpec)) []corev1.Pod {
	s.t.Helper()
	d := deploymentOn("node-a")
	n := int32(replicas)
	d.Spec.Replicas = &n
	for _, c := range change {
		c(&d.Spec.Template.Spec)
	}
	_, err := s.core.AppsV1().Deployments(namespace).Create(s.t.Context(), d, metav1.CreateOptions{})
	require.NoError(s.t, err)
	return s.awaitPods(namespace, replicas)
}

func (s *system) awaitPods(namespace string, n int) (pods []corev1.Pod) {
	s.t.Helper()
	s.eventually(func() error {
		if pods = s.alive(namespace); len(pods) != n {
			return fmt.Errorf("it has %d", len(pods))
		}
		return nil
	}, "a controller does not have its Pods")
	return pods
}

func deploymentOn(node string) *appsv1.Deployment {
	d := deployment()
	d.Spec.Template.Spec.NodeName = node
	return d
}

// alive returns the Pods of a namespace that are not going.
func (s *system) alive(namespace string) []corev1.Pod {
	s.t.Helper()
	pods, err := s.core.CoreV1().Pods(namespace).List(s.t.Context(), metav1.ListOptions{})
	require.NoError(s.t, err)
	return slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

// cannotPull gives a Pod the status that its kubelet would, whom the registry has told what.
func (s *system) cannotPull(pod corev1.Pod, told ...string) {
	s.t.Helper()
	told = append(told, "401 Unauthorized")
	main := pod.Spec.Containers[0]
	_, err := s.core.CoreV1().Pods(pod.Namespace).Patch(s.t.Context(), pod.Name, types.MergePatchType, []byte(`{"status":{"phase":"Pending","containerStatuses":[
		{"name":"`+main.Name+`","image":"`+main.Image+`","imageID":"","ready":false,"restartCount":0,
		 "state":{"waiting":{"reason":"ImagePullBackOff","message":"Back-off pulling image: ErrImagePull: `+told[0]+`"}}}]}}`), metav1.PatchOptions{}, "status")
	require.NoError(s.t, err)
}

// replaced waits until so many Pods of a namespace name the Secret, and as many have made way for them.
func (s *system) replaced(namespace string, n int) {
	s.t.Helper()
	s.eventually(func() error {
		named := 0
		for _, pod := range s.alive(namespace) {
			if slices.Contains(pod.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: secretName}) {
				named++
			}
		}
		if named != n {
			return fmt.Errorf("%d of %s", named, namespace)
		}
		return nil
	}, "not so many Pods were replaced")
}

// evictions are the Pods whose eviction was asked for.
func (s *system) evictions(mark cluster.Mark) (pods []string) {
	s.t.Helper()
	for _, e := range s.requests(mark, "coordinator") {
		if e.Resource == "pods" && e.Subresource == "eviction" {
			pods = append(pods, e.Namespace+"/"+e.Name)
		}
	}
	slices.Sort(pods)
	return slices.Compact(pods) // the first of each is a dry run
}

// told waits for an Event about an object of a namespace.
func (s *system) told(namespace, kind, name, reason string) *corev1.Event {
	s.t.Helper()
	var told *corev1.Event
	s.eventually(func() error {
		events, err := s.core.CoreV1().Events(namespace).List(s.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name})
		if err != nil {
			return err
		}
		i := slices.IndexFunc(events.Items, func(e corev1.Event) bool { return e.Reason == reason })
		if i < 0 {
			return fmt.Errorf("no %s about %s %s/%s among %d Events", reason, kind, namespace, name, len(events.Items))
		}
		told = &events.Items[i]
		return nil
	}, "no Event tells")
	return told
}

// looked waits until the coordinator has read a Pod so many times since.
func (s *system) looked(mark cluster.Mark, pod corev1.Pod, times int) {
	s.t.Helper()
	s.eventually(func() error {
		n := 0
		for _, e := range s.requests(mark, "coordinator") {
			if e.Resource == "pods" && e.Verb == "get" && e.Namespace == pod.Namespace && e.Name == pod.Name {
				n++
			}
		}
		if n < times {
			return fmt.Errorf("%d times", n)
		}
		return nil
	}, "the coordinator has not looked at Pod %s", pod.Name)
}

// Pods that came before their ServiceAccount named the Secret are evicted, and their replacements name it; one of a
// controller at a time, whoever leads.
func TestStuckPodsAreRescuedOneByOne(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.agent("node-a")
	namespace := s.namespace(nil, nil)
	s.eventually(func() error {
		_, err := s.core.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	}, "there is no ServiceAccount")
	pods := s.deploy(namespace, 3)
	for _, pod := range pods {
		s.cannotPull(pod)
	}
	mark := s.control.Audit().Mark()
	coordinator := s.coordinator(allowRescue)
	s.resource(s.prefix, rescuing(namespace))
	s.replaced(namespace, 1)
	evicted := s.evictions(mark)
	require.Len(t, evicted, 1)
	i := slices.IndexFunc(pods, func(p corev1.Pod) bool { return namespace+"/"+p.Name == evicted[0] })
	require.GreaterOrEqual(t, i, 0)
	first := pods[i]
	pods = slices.Delete(pods, i, i+1)
	s.told(namespace, "Pod", first.Name, "Rescued")
	owner := metav1.GetControllerOf(&first)
	turn := s.told(namespace, "ReplicaSet", owner.Name, "RescuingPod")
	require.Contains(t, turn.Message, first.Name)
	require.Equal(t, owner.UID, turn.InvolvedObject.UID)
	s.ready(s.prefix, 1)

	coordinator.stop()
	mark = s.control.Audit().Mark()
	coordinator = s.coordinator(allowRescue)
	for _, pod := range pods {
		s.looked(mark, pod, 1)
	}
	s.calm()
	require.Empty(t, s.evictions(mark), "ten minutes are not over, and the next leader knows that")

	// They are.
	coordinator.stop()
	turn.LastTimestamp = metav1.NewTime(time.Now().Add(-10*time.Minute - time.Second))
	_, err := s.core.CoreV1().Events(namespace).Update(t.Context(), turn, metav1.UpdateOptions{})
	require.NoError(t, err)
	mark = s.control.Audit().Mark()
	s.coordinator(allowRescue)
	s.replaced(namespace, 2)
	require.Len(t, s.evictions(mark), 1)
	require.EqualValues(t, 2, s.told(namespace, "ReplicaSet", owner.Name, "RescuingPod").Count)
}

// Whose replacement would be no better off, or will never be, is left alone.
func TestPodsThatAreNotRescued(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.agent("node-a")
	s.coordinator(allowRescue)
	mark := s.control.Audit().Mark()
	namespaces := map[string]string{}
	create := func(name string) string {
		namespaces[name] = s.namespace(nil, nil)
		s.account(namespaces[name], "other", nil)
		return namespaces[name]
	}
	image := func(name string) func(*corev1.PodSpec) {
		return func(p *corev1.PodSpec) { p.Containers[0].Image = name }
	}
	names := func(secret string) func(*corev1.PodSpec) {
		return func(p *corev1.PodSpec) { p.ImagePullSecrets = []corev1.LocalObjectReference{{Name: secret}} }
	}
	stuck := map[string]corev1.Pod{
		"it names the Secret":              s.deploy(create("named"), 1, names(secretName))[0],
		"its image is of another registry": s.deploy(create("elsewhere"), 1, image("registry.two/app"))[0],
		"its registry was away":            s.deploy(create("away"), 1)[0],
		"its template has one of its own":  s.deploy(create("own"), 1, names("theirs"))[0],
		"its ServiceAccount does not name it": s.deploy(create("account"), 1,
			func(p *corev1.PodSpec) { p.ServiceAccountName = "other" })[0],
		"nobody would make it anew":           *s.podOf(create("bare"), nil),
		"nobody is known to make it anew":     *s.podOf(create("odd"), &metav1.OwnerReference{APIVersion: "v1", Kind: "ConfigMap", Name: "kube-root-ca.crt"}),
		"its Job would fail for good with it": s.job(create("job"), 0),
		"its namespace gets nothing":          s.deploy(create("unselected"), 1)[0],
	}
	// The ServiceAccount has the template's, too, so that the Pod alone does not tell whose list it has.
	s.patchAccount(namespaces["own"], "default", types.MergePatchType, `{"imagePullSecrets":[{"name":"theirs"}]}`)
	again := s.job(create("again"), 1)
	s.cannotPull(stuck["its registry was away"], "503 Service Unavailable")
	for name, pod := range stuck {
		if name != "its registry was away" {
			s.cannotPull(pod)
		}
	}
	barrier := s.namespace(nil, nil)
	waits := s.deploy(barrier, 1)[0]
	selected := []string{barrier}
	for name, namespace := range namespaces {
		if name != "unselected" {
			selected = append(selected, namespace)
		}
	}
	s.resource(s.prefix, rescuing(strings.Join(selected, ", ")))
	s.ready(s.prefix, len(selected))
	silent := []string{"it names the Secret", "its image is of another registry", "its registry was away"}
	for name, pod := range stuck {
		if !slices.Contains(silent, name) && name != "its namespace gets nothing" {
			s.looked(mark, pod, 1)
		}
	}
	s.cannotPull(waits)
	s.replaced(barrier, 1)
	s.cannotPull(again)
	s.eventually(func() error { // the Job waits a while before it makes the next
		if n := len(s.alive(again.Namespace)); n > 0 {
			return fmt.Errorf("%d Pods of %s", n, again.Namespace)
		}
		return nil
	}, "the Pod of a Job with a retry left is not evicted")
	s.calm()
	want := []string{barrier + "/" + waits.Name, again.Namespace + "/" + again.Name}
	slices.Sort(want)
	require.Equal(t, want, s.evictions(mark))
	report := s.reportOf("node-a")
	for _, name := range silent {
		for _, reported := range report.Stuck {
			require.NotEqual(t, stuck[name].UID, reported.UID, "%s: it is not even reported", name)
		}
	}
}

// job creates a Job whose one Pod is bound to node-a, and returns that.
func (s *system) job(namespace string, backoffLimit int32) corev1.Pod {
	s.t.Helper()
	template := deploymentOn("node-a").Spec.Template
	template.Spec.RestartPolicy = corev1.RestartPolicyNever
	_, err := s.core.BatchV1().Jobs(namespace).Create(s.t.Context(), &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Name: "job"}, Spec: batchv1.JobSpec{BackoffLimit: &backoffLimit, Template: template},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	return s.awaitPods(namespace, 1)[0]
}

// podOf creates a Pod on node-a, which says that it has this controller.
func (s *system) podOf(namespace string, owner *metav1.OwnerReference) *corev1.Pod {
	s.t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "single"}, Spec: deploymentOn("node-a").Spec.Template.Spec}
	if owner != nil {
		yes := true
		var config *corev1.ConfigMap
		s.eventually(func() (err error) {
			config, err = s.core.CoreV1().ConfigMaps(namespace).Get(s.t.Context(), owner.Name, metav1.GetOptions{})
			return err
		}, "the owner is not there")
		owner.UID, owner.Controller = config.UID, &yes
		pod.OwnerReferences = []metav1.OwnerReference{*owner}
	}
	var created *corev1.Pod
	s.eventually(func() (err error) { // until the namespace has its ServiceAccount
		created, err = s.core.CoreV1().Pods(namespace).Create(s.t.Context(), pod, metav1.CreateOptions{})
		return err
	}, "cannot create a Pod")
	return created
}

// A budget of 0 holds a Pod, until it allows one more; and an agent has no right to evict at all.
func TestADisruptionBudgetHoldsAStuckPod(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.agent("node-a")
	namespace := s.namespace(nil, nil)
	budgets := s.core.PolicyV1().PodDisruptionBudgets(namespace)
	none := intstr.FromInt32(0)
	_, err := budgets.Create(t.Context(), &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: "none"},
		Spec:       policyv1.PodDisruptionBudgetSpec{MaxUnavailable: &none, Selector: &metav1.LabelSelector{}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	pod := s.deploy(namespace, 1)[0]
	s.cannotPull(pod)
	mark := s.control.Audit().Mark()
	s.coordinator(allowRescue)
	s.resource(s.prefix, rescuing(namespace))
	told := s.told(namespace, "Pod", pod.Name, "RescueWaits")
	require.Contains(t, told.Message, "PodDisruptionBudget none allows no eviction")
	s.looked(mark, pod, 4)
	require.Empty(t, s.evictions(mark))
	s.ready(s.prefix, 1)

	eviction := fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`, pod.Name, namespace)
	require.Equal(t, http.StatusForbidden, send(t, s.config(s.nodeToken("node-a"), "intruder"),
		request{"POST", "/api/v1/namespaces/" + namespace + "/pods/" + pod.Name + "/eviction", asJSON, eviction}))
	require.Len(t, s.alive(namespace), 1)

	_, err = budgets.Patch(t.Context(), "none", types.MergePatchType, []byte(`{"spec":{"maxUnavailable":1}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	s.replaced(namespace, 1)
	require.Equal(t, []string{namespace + "/" + pod.Name}, s.evictions(mark))
}

// Where the installation does not allow it, no Pod is even reported.
func TestRescueThatIsNotAllowed(t *testing.T) {
	s := newSystem(t)
	s.source("hub", dockerConfig("registry.one"))
	s.agent("node-a")
	namespace := s.namespace(nil, nil)
	pod := s.deploy(namespace, 1)[0]
	s.cannotPull(pod)
	mark := s.control.Audit().Mark()
	s.coordinator()
	s.resource(s.prefix, rescuing(namespace))
	s.failed(s.prefix, "spec.target.rescue is set, and --allow-rescue is not", "the chart's value allowRescue sets it")
	s.says(s.prefix, v1alpha1.ConditionServiceAccountsReady, "1 of 1 ServiceAccounts name the Secret")
	s.has(namespace, "registry.one")
	s.calm()
	require.Empty(t, s.reportOf("node-a").Stuck)
	require.Empty(t, s.evictions(mark))
	require.Len(t, s.alive(namespace), 1)
}
