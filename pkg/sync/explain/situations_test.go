package explain

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// situation is a Pod that is refused, though all that imps has to do is done; what a test changes is what is the matter.
type situation struct {
	*facts
	now      time.Time
	excluded impsync.Exclusion
}

func newSituation(t *testing.T) *situation {
	t.Helper()
	s := &situation{now: noon.Add(time.Hour), facts: &facts{
		namespace: &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}},
		account: &corev1.ServiceAccount{
			ObjectMeta: metav1.ObjectMeta{Name: "default", Annotations: map[string]string{
				impsync.AnnotationAttached: "pull", impsync.AnnotationAttachedAt: noon.Format(time.RFC3339),
			}},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}},
		},
		seesAccount: true, seesTemplate: true, seesPods: true, installed: true, listed: true,
		rendered: map[types.UID]impsync.Rendered{}, secrets: map[string]*secret{},
		pod: &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p", CreationTimestamp: metav1.NewTime(noon.Add(time.Minute))},
			Spec: corev1.PodSpec{
				NodeName: "n1", ServiceAccountName: "default", ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}},
				Containers: []corev1.Container{{Name: "app", Image: "r.one/app"}},
			},
		},
	}}
	s.says("ImagePullBackOff", `Back-off pulling image "r.one/app": ErrImagePull: 401 Unauthorized`)
	s.resource(t, "a", 0, "pull", "r.one")
	s.secrets["pull"] = s.secretOf(t, "a")
	return s
}

// says is what the kubelet says of the container.
func (s *situation) says(reason, message string) {
	s.pod.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "app", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
	}}
}

// resource adds a resource that selects the namespace, made so many minutes after noon, and what it delivers.
func (s *situation) resource(t *testing.T, name string, minutes int, secretName, registry string) *v1alpha1.ImagePullSecret {
	t.Helper()
	r := v1alpha1.ImagePullSecret{ObjectMeta: metav1.ObjectMeta{
		Name: name, UID: types.UID("uid-" + name), CreationTimestamp: metav1.NewTime(noon.Add(time.Duration(minutes) * time.Minute)),
	}}
	r.Spec.Target.Secret.Name, r.Spec.Target.Namespaces.Names, r.Status.ObservedGeneration = secretName, []string{"n"}, 1
	target, err := impsync.NewTarget(impsync.RefOf(&r), r.Spec.Target.Secret, 7, dockerconfig.NewSensitive(`{"auths":{"`+registry+`":{"username":"u","password":"`+canary+`"}}}`))
	require.NoError(t, err)
	s.rendered[r.UID] = impsync.Rendered{FormatVersion: 1, Resource: impsync.RefOf(&r), Namespaces: r.Spec.Target.Namespaces, Target: target}
	s.resources = append(s.resources, r)
	return &s.resources[len(s.resources)-1]
}

// secretOf is the Secret of a resource as an apply leaves it.
func (s *situation) secretOf(t *testing.T, name string) *secret {
	t.Helper()
	var object corev1.Secret
	require.NoError(t, json.Unmarshal(s.rendered[types.UID("uid-"+name)].Target.Body("", ""), &object))
	at := metav1.NewTime(noon)
	object.ManagedFields = []metav1.ManagedFieldsEntry{{
		Manager: impsync.FieldManager, Operation: metav1.ManagedFieldsOperationApply, Time: &at,
		FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:annotations":{"f:` + impsync.AnnotationRevision + `":{}}}}`),
	}}
	return secretOf(&object)
}

// edit changes the first resource.
func (s *situation) edit(change func(*v1alpha1.ImagePullSecret)) { change(&s.resources[0]) }

func TestSituations(t *testing.T) {
	t.Parallel()
	yes := true
	unnamed := func(s *situation) { s.pod.Spec.ImagePullSecrets = nil }
	deselect := func(s *situation) {
		r := s.rendered["uid-a"]
		r.Namespaces.Names = []string{"elsewhere"}
		s.rendered["uid-a"] = r
	}
	tests := map[string]struct {
		change func(t *testing.T, s *situation)
		cause  Cause
		says   string // in why or next
		not    string
	}{
		"nothing is the matter but the credentials": {func(*testing.T, *situation) {}, CauseRefused, "try the credentials of the sources of ImagePullSecret a by hand", ""},
		"the registry could not be reached an hour ago, and refuses now": {func(_ *testing.T, s *situation) {
			s.failures = []failure{{`Failed to pull image "r.one/app": dial tcp: no such host`, noon}}
		}, CauseRefused, "", ""},
		"the last failure was long before the Secret was changed, and it is still refused": {func(_ *testing.T, s *situation) {
			s.failures = []failure{{`Failed to pull image "r.one/app": 401 Unauthorized`, noon.Add(-time.Hour)}}
		}, CauseRefused, "", "wait"},
		"the last failure was before the Secret was changed, a moment ago": {func(_ *testing.T, s *situation) {
			s.failures = []failure{{`Failed to pull image "r.one/app": 401 Unauthorized`, noon.Add(-time.Hour)}}
			s.now = noon.Add(time.Minute)
		}, CauseBackOff, "wait: the kubelet tries again within five minutes", ""},
		"the node's disk is full, and nothing is selected": {func(_ *testing.T, s *situation) {
			deselect(s)
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.Spec.Target.Namespaces.Names = nil })
			s.says("ErrImagePull", "failed to extract layer: no space left on device")
		}, CausePullFailed, "not about credentials", ""},
		"a signature is wrong": {func(_ *testing.T, s *situation) { s.says("SignatureValidationFailed", "no") }, CausePullFailed, "", ""},
		"Docker Hub limits anonymous pulls": {func(_ *testing.T, s *situation) {
			s.pod.Spec.Containers[0].Image = "nginx"
			s.says("ErrImagePull", "429 Too Many Requests - Server message: toomanyrequests: You have reached your unauthenticated pull rate limit")
		}, CauseNoResource, "the registry limits pulls without", ""},
		"Docker Hub limits those of an account": {func(t *testing.T, s *situation) {
			s.resources = nil
			s.resource(t, "a", 0, "pull", "docker.io")
			s.secrets["pull"] = s.secretOf(t, "a")
			s.pod.Spec.Containers[0].Image = "nginx"
			s.says("ErrImagePull", "toomanyrequests: You have reached your pull rate limit")
		}, CauseLimited, "wait, or raise the limit", ""},
		"the kubelet does not say why":                                    {func(_ *testing.T, s *situation) { s.says("ImagePullBackOff", `Back-off pulling image "r.one/app"`) }, CausePullFailed, "the kubelet does not tell", ""},
		"the resource was made anew, and its Secret is of the one before": {func(_ *testing.T, s *situation) { s.secrets["pull"].existing.OwnerUID = "uid-before" }, CauseStale, "was not taken over yet", "older"},
		"the Secret is from a backup":                                     {func(_ *testing.T, s *situation) { s.secrets["pull"].existing.Ownership = impsync.Restored }, CauseStale, "was not taken over yet", ""},
		"the Secret is IMPS's":                                            {func(_ *testing.T, s *situation) { s.secrets["pull"].existing.Ownership = impsync.Legacy }, CauseStale, "was not taken over yet", ""},
		"the Secret is held by a finalizer":                               {func(_ *testing.T, s *situation) { s.secrets["pull"].existing.Deleting = true }, CauseStale, "a finalizer holds it", ""},
		"an older resource claims the Secret": {func(t *testing.T, s *situation) {
			s.resource(t, "elder", -1, "pull", "r.two")
			s.secrets["pull"] = s.secretOf(t, "elder")
		}, CauseClaimed, "ImagePullSecret elder, which is older", ""},
		"a younger one does, and has it still": {func(t *testing.T, s *situation) {
			s.resource(t, "younger", 1, "pull", "r.two")
			s.secrets["pull"] = s.secretOf(t, "younger")
		}, CauseStale, "was not taken over yet", "older"},
		"somebody has put an old password back": {func(t *testing.T, s *situation) {
			config, _, err := dockerconfig.Parse(dockerconfig.TypeDockerConfigJSON, map[string][]byte{dockerconfig.KeyDockerConfigJSON: []byte(`{"auths":{"r.one":{"username":"u","password":"old"}}}`)})
			require.NoError(t, err)
			s.secrets["pull"].credentials = config
		}, CauseStale, "does not hold what is to be delivered", ""},
		"the template names the Secret by now": {func(_ *testing.T, s *situation) {
			unnamed(s)
			s.template = &corev1.PodSpec{ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}}}
			s.pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "db", Controller: &yes}}
		}, CauseTemplateNewer, "kubectl delete pod -n n p: StatefulSet db makes it anew", "add"},
		"the template names another, which the ServiceAccount does, too": {func(_ *testing.T, s *situation) {
			s.pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "theirs"}}
			s.template = &corev1.PodSpec{ImagePullSecrets: s.pod.Spec.ImagePullSecrets}
			s.account.ImagePullSecrets = append(s.account.ImagePullSecrets, s.pod.Spec.ImagePullSecrets...)
		}, CauseOwnPullSecrets, "add pull to imagePullSecrets in the Pod's template", ""},
		"a controller that nobody knows": {func(_ *testing.T, s *situation) {
			unnamed(s)
			s.pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps.kruise.io/v1", Kind: "CloneSet", Name: "app", Controller: &yes}}
		}, CauseAttachedLate, "CloneSet app makes it anew, if it is still there", ""},
		"the ServiceAccount's entry is its user's own": {func(_ *testing.T, s *situation) {
			unnamed(s)
			delete(s.account.Annotations, impsync.AnnotationAttached)
			s.pod.CreationTimestamp = metav1.NewTime(noon.Add(24 * time.Hour))
		}, CauseAttachedLate, "most likely it came before", ""},
		"the ServiceAccount is gone": {func(_ *testing.T, s *situation) {
			unnamed(s)
			s.account = nil
		}, CauseNotNamed, "its ServiceAccount default is not there", ""},
		"the Pod names a Secret that is not there": {func(_ *testing.T, s *situation) {
			s.resources, s.pod.Spec.ImagePullSecrets = nil, []corev1.LocalObjectReference{{Name: "regcred"}}
			s.secrets["regcred"] = nil
		}, CauseNoResource, "Secret regcred, which the Pod names, is not there", ""},
		"the Pod names somebody's Secret, which the registry refuses": {func(_ *testing.T, s *situation) {
			s.resources = nil
		}, CauseNoResource, "Secret pull, which the Pod names, has credentials for the image, and is of no ImagePullSecret", ""},
		"another resource has some for this very repository": {func(t *testing.T, s *situation) {
			s.resource(t, "exact", 1, "exact", "r.one/app")
			s.secrets["exact"] = s.secretOf(t, "exact")
		}, CauseRefused, "ImagePullSecret exact has some, too: neither the Pod nor its ServiceAccount default names Secret exact", ""},
		"the resource is being deleted, and its Secret is there": {func(_ *testing.T, s *situation) {
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.DeletionTimestamp = &metav1.Time{Time: noon} })
			s.says("ErrImagePull", "manifest unknown")
		}, CauseImageNotFound, "", ""},
		"the resource is being deleted, and its Secret is not there": {func(_ *testing.T, s *situation) {
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.DeletionTimestamp = &metav1.Time{Time: noon} })
			s.secrets["pull"] = nil
		}, CauseNotDelivering, "it is being deleted", ""},
		"whether other Pods have it selected is not to be seen": {func(_ *testing.T, s *situation) {
			deselect(s)
			r := s.rendered["uid-a"]
			r.Pods.Labels = []metav1.LabelSelector{{MatchLabels: map[string]string{"a": "b"}}}
			s.rendered["uid-a"], s.seesPods, s.secrets["pull"] = r, false, nil
		}, CauseNoSecret, "", "no selector"},
		"its spec selects the namespace, and is not in force": {func(_ *testing.T, s *situation) {
			deselect(s)
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.Status.Reason = "a source is missing" })
		}, CauseNotDelivering, "its spec selects namespace n, and is not in force yet: a source is missing", ""},
		"the coordinator excludes namespaces, which explain was not told": {func(_ *testing.T, s *situation) {
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.Status.Namespaces = &v1alpha1.NamespaceCounts{Excluded: 3} })
			s.secrets["pull"] = nil
		}, CauseNoSecret, "3 namespaces are excluded by the coordinator's --excluded-namespaces", ""},
		"the Secret cannot be read": {func(_ *testing.T, s *situation) { delete(s.secrets, "pull") }, CauseRefused, "which cannot be read with these rights", "is there"},
		"the image may never be pulled, and the Secret is not named": {func(_ *testing.T, s *situation) {
			unnamed(s)
			s.says("ErrImageNeverPull", "Container image \"r.one/app\" is not present with pull policy of Never")
		}, CauseNeverPull, "it came too early", ""},
		"its configuration is wrong": {func(_ *testing.T, s *situation) {
			unnamed(s)
			s.says("CreateContainerConfigError", `configmap "x" not found`)
		}, CausePulled, "nothing about the image", ""},
		"it crashes": {func(_ *testing.T, s *situation) { s.says("CrashLoopBackOff", "") }, CausePulled, "", ""},
		"a static Pod": {func(_ *testing.T, s *situation) {
			unnamed(s)
			s.pod.Spec.ServiceAccountName, s.account = "", nil
		}, CauseNotNamed, "add pull to imagePullSecrets", ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSituation(t)
			test.change(t, s)
			s.neighbours = append(s.neighbours, s.pod.ObjectMeta)
			result := s.explain(nil, s.now)
			got := result.Containers[0]
			require.Equal(t, test.cause, got.Cause, "%s; %s", got.Why, got.Next)
			require.Contains(t, got.Why+"; "+got.Next, test.says)
			if test.not != "" {
				require.NotContains(t, got.Why+"; "+got.Next, test.not)
			}
			for _, r := range got.Resources {
				require.Contains(t, way, r.Cause, "without a place on the way it would come last")
			}
			raw, err := json.Marshal(result)
			require.NoError(t, err)
			require.NotContains(t, string(raw), canary)
		})
	}
}

// The image of a volume is pulled like that of a container, and it is the container that says so.
func TestTheImageOfAVolume(t *testing.T) {
	t.Parallel()
	s := newSituation(t)
	s.pod.Spec.Containers[0].Image = "nginx"
	s.pod.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "r.one/data:1"}}}}
	s.says("ImagePullBackOff", `Back-off pulling image "r.one/data:1": ErrImagePull: 401 Unauthorized`)
	got := s.explain(nil, s.now).Containers
	require.Len(t, got, 2)
	require.Equal(t, CauseWaiting, got[0].Cause)
	require.Equal(t, "volume data", got[1].Name)
	require.Equal(t, "r.one/data", got[1].Repository)
	require.Equal(t, CauseRefused, got[1].Cause)
	require.Equal(t, "401 Unauthorized", got[1].Error)
}

// The Pod names no Secret in all of these but some, and the resource asks for kubelets.
func TestSituationsOfTheNodeCache(t *testing.T) {
	t.Parallel()
	const namespace, node = v1alpha1.KubeletScopeNamespace, v1alpha1.KubeletScopeNode
	render := func(change func(*impsync.Rendered)) func(*testing.T, *situation) {
		return func(_ *testing.T, s *situation) {
			r := s.rendered["uid-a"]
			change(&r)
			s.rendered["uid-a"] = r
		}
	}
	named := func(s *situation) { s.pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}} }
	deselect := render(func(r *impsync.Rendered) { r.Namespaces.Names = nil })
	unselected := func(t *testing.T, s *situation) {
		deselect(t, s)
		s.edit(func(r *v1alpha1.ImagePullSecret) { r.Spec.Target.Namespaces.Names = nil })
		delete(s.account.Annotations, impsync.AnnotationAttached)
		s.account.ImagePullSecrets, s.secrets["pull"] = nil, nil
	}
	byPods := func(t *testing.T, s *situation) {
		render(func(r *impsync.Rendered) {
			r.Namespaces.Names, r.Pods.Labels = nil, []metav1.LabelSelector{{MatchLabels: map[string]string{"pull": "x"}}}
		})(t, s)
		s.neighbours = []metav1.ObjectMeta{{Labels: map[string]string{"pull": "x"}}}
	}
	tests := map[string]struct {
		scope  v1alpha1.KubeletScope
		change func(t *testing.T, s *situation)
		cause  Cause
		served Answer
		says   string // in why or next
		not    string
	}{
		"the node has them for the namespace": {namespace, func(*testing.T, *situation) {}, CauseNodeProvider, Yes,
			"either the kubelet does not ask for them, or the registry refuses them; by its Secret they do not come: ", ""},
		"the node has them for all, and nothing selects the namespace": {node, unselected, CauseNodeProvider, Yes, "these credentials for every Pod of the node; whether the kubelet asks imps-credprovider", ""},
		"the node has them, and another resource is broken that selects the namespace": {node, func(t *testing.T, s *situation) {
			unselected(t, s)
			s.resource(t, "broken", 1, "other", "r.two")
			s.rendered["uid-broken"] = impsync.Rendered{}
		}, CauseNodeProvider, Yes, "ImagePullSecret a: ", "broken"},
		"the node has them for all, also in a namespace that is excluded": {node, func(_ *testing.T, s *situation) { s.excluded = impsync.Exclusion{"n"} }, CauseNodeProvider, Yes, "--excluded-namespaces excludes", ""},
		"the namespace is excluded":                                       {namespace, func(_ *testing.T, s *situation) { s.excluded = impsync.Exclusion{"n"} }, CauseExcluded, No, "", "node n1"},
		"the namespace may be excluded": {namespace, func(_ *testing.T, s *situation) {
			s.secrets["pull"] = nil
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.Status.Namespaces = &v1alpha1.NamespaceCounts{Excluded: 3} })
		}, CauseNoSecret, Unknown, "whether kubelets are served is not known: 3 namespaces", ""},
		"nothing selects the namespace":                       {namespace, unselected, CauseNotSelected, No, "no selector of its spec.target selects namespace n", "kubelet"},
		"the spec selects the namespace, and is not in force": {namespace, deselect, CauseNotDelivering, No, "is not in force yet", ""},
		"a Pod elsewhere selects the namespace":               {namespace, byPods, CauseAttachedLate, No, "it came too early to get the name; for kubelets neither namespace n itself nor a Pod of it on this node is selected", ""},
		"a Pod of the node selects the namespace": {namespace, func(t *testing.T, s *situation) {
			byPods(t, s)
			s.node.report.Demand = map[string][]types.UID{"n": {"uid-a"}}
		}, CauseNodeProvider, Yes, "for Pods of namespace n", ""},
		"whether a Pod of the node does is not to be seen": {namespace, func(t *testing.T, s *situation) {
			byPods(t, s)
			s.node = nodeFacts{}
		}, CauseAttachedLate, Unknown, "whether namespace n is selected for kubelets is not known", ""},
		"a static Pod, and the namespace's": {namespace, func(_ *testing.T, s *situation) {
			s.pod.Spec.ServiceAccountName, s.account = "", nil
		}, CauseNotNamed, No, "the Pod has no ServiceAccount, as static ones have none", ""},
		"a static Pod, and the node's": {node, func(_ *testing.T, s *situation) {
			s.pod.Spec.ServiceAccountName, s.account = "", nil
		}, CauseNodeProvider, Yes, "", ""},
		"the Pod has pull Secrets of its own": {namespace, func(_ *testing.T, s *situation) {
			s.pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "theirs"}}
		}, CauseNodeProvider, Yes, "by its Secret they do not come: the Pod has pull Secrets of its own (theirs)", ""},
		"a Secret in the way that is not imps's": {namespace, func(_ *testing.T, s *situation) {
			named(s)
			s.secrets["pull"].existing.Ownership = impsync.Foreign
		}, CauseNodeProvider, Yes, "or delete or rename it", ""},
		"the registry says that there is no such image": {namespace, func(_ *testing.T, s *situation) { s.says("ErrImagePull", "manifest unknown") }, CauseNodeProvider, Yes, "as some do to whoever has no right to it", ""},
		"the registry limits pulls":                     {namespace, func(_ *testing.T, s *situation) { s.says("ErrImagePull", "toomanyrequests") }, CauseNodeProvider, Yes, "most of all without credentials", ""},
		"nothing has failed so far":                     {namespace, func(_ *testing.T, s *situation) { s.says("ContainerCreating", "") }, CauseWaiting, Yes, "if the image is private: ImagePullSecret a: the agent of node n1 says", "tries again"},
		"the Pod names the Secret as well":              {namespace, func(_ *testing.T, s *situation) { named(s) }, CauseRefused, Yes, "Secret pull is there, and the Pod names it; the registry refuses what it holds", "node n1"},
		"the Pod names the Secret, and the node serves nothing": {namespace, func(_ *testing.T, s *situation) {
			named(s)
			s.node.report = nil
		}, CauseRefused, No, "", "agent"},
		"the credentials have expired": {namespace, render(func(r *impsync.Rendered) { r.Expiries = map[string]time.Time{"r.one": noon} }), CauseExpired, No, "have expired at 2026-03-01T12:00:00Z", "name"},
		"the node has no agent, and the ServiceAccount would do": {namespace, func(_ *testing.T, s *situation) { s.node.report = nil },
			CauseAttachedLate, No, "it came too early to get the name; node n1 serves nothing to its kubelet: no agent reports from it", ""},
		"the node has no agent":               {node, func(t *testing.T, s *situation) { unselected(t, s); s.node.report = nil }, CauseNodeNotServing, No, "the chart's DaemonSet has a Pod on node n1", ""},
		"the agent keeps no cache":            {node, func(t *testing.T, s *situation) { unselected(t, s); s.node.report.Kubelet = nil }, CauseNodeNotServing, No, "nodeCache.enabled", ""},
		"the agent cannot write its cache":    {node, func(t *testing.T, s *situation) { unselected(t, s); s.node.report.Kubelet.Problem = "disk\x1b full" }, CauseNodeNotServing, No, "its agent says: disk  full", ""},
		"the report is not to be seen":        {node, func(t *testing.T, s *situation) { unselected(t, s); s.node = nodeFacts{} }, CauseNotSelected, Unknown, "whether node n1 serves its kubelet is not known", ""},
		"an old kubelet, and the namespace's": {namespace, func(_ *testing.T, s *situation) { s.account.ImagePullSecrets, s.node.kubelet = nil, "v1.33.9-eks-1" }, CauseNodeNotServing, No, "is v1.33.9-eks-1: before 1.34", ""},
		"an old kubelet, and the node's":      {node, func(_ *testing.T, s *situation) { s.node.kubelet = "v1.33.9" }, CauseNodeProvider, Yes, "", ""},
		"a kubelet of nobody knows which age": {namespace, func(_ *testing.T, s *situation) { s.node.kubelet = "" }, CauseAttachedLate, Unknown, "whether the kubelet of node n1 is of 1.34 or later", ""},
		"no node has the Pod":                 {node, func(_ *testing.T, s *situation) { s.pod.Spec.NodeName = ""; s.says("", "") }, CauseNotScheduled, Unknown, "no node has the Pod yet, whose kubelet may be served", ""},
		"the resource does not ask for it in force": {"", func(_ *testing.T, s *situation) {
			s.edit(func(r *v1alpha1.ImagePullSecret) {
				r.Spec.Target.Kubelet, r.Status.Reason = &v1alpha1.KubeletSpec{}, "a source is gone"
			})
		}, CauseAttachedLate, No, "spec.target.kubelet is not in force yet: a source is gone", ""},
		"what the resource delivers is not to be seen": {"", func(_ *testing.T, s *situation) {
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.Spec.Target.Kubelet = &v1alpha1.KubeletSpec{} })
			delete(s.rendered, "uid-a")
		}, CauseAttachedLate, Unknown, "what kubelets are served of it is not known", ""},
		"the resource is being deleted": {node, func(_ *testing.T, s *situation) {
			s.edit(func(r *v1alpha1.ImagePullSecret) { r.DeletionTimestamp = &metav1.Time{Time: noon} })
		}, CauseNotDelivering, No, "it is being deleted", "node"},
		"an older resource has some for the registry": {node, func(t *testing.T, s *situation) {
			unselected(t, s)
			s.resource(t, "elder", -1, "elder", "r.one")
			r := s.rendered["uid-elder"]
			r.Kubelet = node
			s.rendered["uid-elder"] = r
		}, CauseNodeProvider, No, "ImagePullSecret elder: the agent of node n1 says", ""},
		"older ones have some for another registry, in another scope, or for another namespace": {namespace, func(t *testing.T, s *situation) {
			elder := func(name, registry string, scope v1alpha1.KubeletScope, selected string) {
				s.resource(t, name, -1, name, registry)
				r := s.rendered[types.UID("uid-"+name)]
				r.Kubelet, r.Namespaces.Names = scope, []string{selected}
				s.rendered[r.Resource.UID] = r
			}
			elder("of-another-registry", "r.one/app", namespace, "n")
			elder("of-the-node", "r.one", node, "n")
			elder("of-another-namespace", "r.one", namespace, "elsewhere")
		}, CauseNodeProvider, Yes, "", "instead"},
		"a token alone": {node, func(t *testing.T, s *situation) {
			unselected(t, s)
			r := s.rendered["uid-a"]
			var err error
			r.Target, err = r.Target.WithConfig(8, dockerconfig.NewSensitive(`{"auths":{"r.one":{"identitytoken":"`+canary+`"}}}`))
			require.NoError(t, err)
			s.rendered["uid-a"] = r
		}, CauseNotSelected, No, "kubelets are served no credentials that are tokens alone", ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSituation(t)
			s.pod.Spec.ImagePullSecrets = nil
			s.node = nodeFacts{seen: true, report: &impsync.Report{Node: "n1", Kubelet: &impsync.KubeletReport{}}, kubelet: "v1.34.0"}
			render(func(r *impsync.Rendered) { r.Kubelet = test.scope })(t, s)
			test.change(t, s)
			result := s.explain(s.excluded, s.now)
			got := result.Containers[0]
			of := slices.IndexFunc(got.Resources, func(r Resource) bool { return r.Name == "a" })
			said := got.Why + "; " + got.Next + "; " + got.Resources[of].Next
			require.Equal(t, test.cause, got.Cause, said)
			require.Contains(t, said, test.says)
			if test.not != "" {
				require.NotContains(t, said, test.not)
			}
			require.Equal(t, test.served, got.Resources[of].Kubelet.Served, got.Resources[of].Kubelet.Why)
			raw, err := json.Marshal(result)
			require.NoError(t, err)
			require.NotContains(t, string(raw), canary)
			require.NotContains(t, string(raw), `\u001b`)
		})
	}
}
